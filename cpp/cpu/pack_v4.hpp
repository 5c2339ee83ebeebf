// x86-64-v4: AVX-512.
#pragma once
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
