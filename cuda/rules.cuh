// The update rules of cpp/rules as kernels have them: a pack of columns is a thread's column.
#pragma once

#include "primitives/primitives.cuh"

#define FWP_HD FWP_DEVICE
#ifdef __CUDACC__
#define FWP_UNROLL _Pragma("unroll")
#define FWP_PRAGMA(text) _Pragma(#text)
#define FWP_UNROLL_BY(n) FWP_PRAGMA(unroll n)
#else
#define FWP_UNROLL _Pragma("GCC unroll 32")
#define FWP_UNROLL_BY(n)
#endif

#include "../cpp/rules/block.hpp"
#include "../cpp/rules/decay.hpp"
#include "../cpp/rules/delta.hpp"
#include "../cpp/rules/linear.hpp"
