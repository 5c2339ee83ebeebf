# The instruction set levels that can be built here, best last, and the compiler flags of each.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(levels base v3 v4)
  set(FWP_ISA_FLAGS_base -march=x86-64)
  set(FWP_ISA_FLAGS_v3 -march=x86-64-v3)
  set(FWP_ISA_FLAGS_v4 -march=x86-64-v4 -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(levels base neon)
else()
  set(levels base)
endif()
set(FWP_ISA_LEVELS "${levels}" CACHE STRING "Instruction set levels to build, of ${levels}; base is a must")
foreach(isa IN LISTS FWP_ISA_LEVELS)
  if(NOT isa IN_LIST levels)
    message(FATAL_ERROR "FWP_ISA_LEVELS: expected some of ${levels}, got ${isa}")
  endif()
endforeach()
if(NOT "base" IN_LIST FWP_ISA_LEVELS)
  message(FATAL_ERROR "FWP_ISA_LEVELS: expected base among the levels, got ${FWP_ISA_LEVELS}")
endif()

# FMA contraction is meant: results are bitwise equal for one level and build. Never -ffast-math.
# Vectors wider than the base registers are passed between inlined functions only, so their ABI does not matter.
set(FWP_KERNEL_FLAGS $<$<NOT:$<CONFIG:Debug>>:-O3> -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi)
