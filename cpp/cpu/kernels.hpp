// What one instruction set level offers: a table of plain functions, filled by kernels.cpp once per level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fwp {

struct Problem;
struct Geometry;
struct ForwardPart;
struct BackwardPart;
struct ReducePart;
struct Stop;

struct Kernels {
  const char* name;
  Geometry (*geometry)(const Problem&);
  // Bytes of scratch, whole lines, for one worker whose parts have so many heads and tiles; backward's serves reduce
  // too.
  size_t (*forward_scratch)(const Problem&, const Geometry&, int64_t heads, int64_t tiles);
  size_t (*backward_scratch)(const Problem&, const Geometry&, int64_t heads);
  void (*forward)(const Problem&, const Geometry&, const ForwardPart&, void* scratch, const Stop&);
  void (*backward)(const Problem&, const Geometry&, const BackwardPart&, void* scratch, const Stop&);
  void (*reduce)(const Problem&, const ReducePart&, void* scratch, const Stop&);
  void (*sum_dz)(const Problem&, const Geometry&, int64_t n, void* D);  // the z of dh0, from the adjoints of a sequence
  // Probes of one head of a sequence: [T][H][kProbes] in p.o, of the accumulation type.
  size_t (*diagnose_scratch)(const Problem&, const Geometry&);
  void (*diagnose)(const Problem&, const Geometry&, int64_t n, int64_t h, void* scratch, const Stop&);
  // A feature map by itself, on rows [begin, end) (dispatch.hpp).
  size_t (*map_scratch)(const Problem&);
  void (*map_rows)(const Problem&, int64_t begin, int64_t end, void* scratch);
  // Runs independent fused multiply-adds in registers; returns how many flops that were.
  double (*fma)(bool f64, int64_t rounds);
};

}  // namespace fwp
