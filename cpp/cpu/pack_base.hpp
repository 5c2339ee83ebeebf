// x86-64 without extensions, and any other machine: 16-byte vectors, 16 registers.
#pragma once
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
