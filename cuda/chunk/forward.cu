#include "chunk.hpp"

#include "launch_chunk.cuh"
