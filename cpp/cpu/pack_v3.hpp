// x86-64-v3: AVX2 and FMA.
#pragma once
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
