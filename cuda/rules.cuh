// The update rules of cpp/rules as kernels have them: a pack of columns is a thread's column.
#pragma once

#include "primitives/primitives.cuh"

#define FWP_HD FWP_DEVICE

#include "../cpp/rules/block.hpp"
#include "../cpp/rules/decay.hpp"
#include "../cpp/rules/delta.hpp"
#include "../cpp/rules/linear.hpp"
