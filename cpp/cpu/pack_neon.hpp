// Advanced SIMD of 64-bit Arm.
#pragma once
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
