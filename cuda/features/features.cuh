// The kernels of features.hpp: a warp takes some rows, one after the other, through shared memory, or through its room
// in the workspace where rows are too large for that.
#pragma once

#include "../rows.cuh"
#include "features.hpp"
#include "warp.cuh"

namespace fwp::cuda::features {

// Where the rows that a warp works on lie in its memory, in numbers.
struct Room {
  int64_t x = 0, dx = 0, y = 0, normalised = 0, dy = 0, work = 0, numbers = 0;

  template <class T>
  static Room of(const Features& f, bool backward) {
    using Tile = Warp<T, InShared>;
    Room room;
    const auto take = [&room](int64_t n) {
      const int64_t at = room.numbers;
      room.numbers += Tile::up(n);
      return at;
    };
    room.x = take(f.inputs);
    room.y = take(f.outputs);
    room.work = take(FeatureRow<Tile>::work_size(f));
    if (!backward) return room;
    room.dx = take(f.inputs);
    room.dy = take(f.outputs);
    room.normalised = take(f.norm != Norm::none ? f.outputs : 0);
    return room;
  }
};

struct Pass {
  Features features;
  Shape shape;
  Room room;
  Rows x, y, dy, dx;
};

constexpr int64_t kRowsPerWarp = 8;

// Calls f with a pointer to the row at this place, in numbers, of the type that is stored.
template <class T, class F>
FWP_DEVICE void with_row(const Rows& rows, int64_t at, const F& f) {
  if constexpr (sizeof(T) == 8) return f(static_cast<double*>(rows.data) + at);
  if (rows.dtype == DType::f32) return f(static_cast<float*>(rows.data) + at);
  if (rows.dtype == DType::bf16) return f(static_cast<BFloat*>(rows.data) + at);
  f(static_cast<Half*>(rows.data) + at);
}

template <class Place, class T>
FWP_DEVICE void load_row(const Rows& rows, int64_t at, int64_t n, T* to) {
  with_row<T>(rows, at, [n, to](const auto* from) {
    for (int64_t i = lane(); i - lane() < n; i += kWarpSize)
      Place::store(to + i, i < n ? static_cast<T>(widened(load_global(from + i))) : T(0));
  });
}
template <class Place, class T>
FWP_DEVICE void store_row(const T* from, int64_t n, const Rows& rows, int64_t at) {
  with_row<T>(rows, at, [n, from](auto* to) {
    using X = std::remove_pointer_t<decltype(to)>;
    for (int64_t i = lane(); i < n; i += kWarpSize)
      store_global(to + i, Rounded<X>::of(static_cast<Accumulation<X>>(Place::load(from + i))));
  });
}

template <class Place, bool backward, class T>
FWP_DEVICE void transform_row(const Pass& pass, const Features& f, T* memory, int64_t b, int64_t t, int64_t h) {
  const Room& room = pass.room;
  T* const dy = memory + room.dy;
  const FeatureRow<Warp<T, Place>> row{
      f, memory + room.x, memory + room.dx, memory + room.y, memory + room.normalised, memory + room.work};
  const auto at = [b, t, h](const Rows& rows) { return b * rows.b + t * rows.t + h * rows.h; };
  load_row<Place>(pass.x, at(pass.x), f.inputs, row.x);
  if constexpr (backward) {
    load_row<Place>(pass.dy, at(pass.dy), f.outputs, dy);
    row.backward(dy);
    store_row<Place>(row.dx, f.inputs, pass.dx, at(pass.dx));
  } else {
    row.forward(row.y);
    store_row<Place>(row.y, f.outputs, pass.y, at(pass.y));
  }
  sync_warp();  // the next row goes where this one was read
}

// A kernel for each map: FAVOR+ takes three times the registers of the others.
template <class T, Map map, bool backward>
FWP_KERNEL void transform(FWP_PARAMETER Pass pass) {
  Features f = pass.features;
  f.map = map;
  const Shape& shape = pass.shape;
  T* const memory = static_cast<T*>(shared_memory()) + warp() * pass.room.numbers;
  const int64_t first = (static_cast<int64_t>(block_index_x()) * (block_threads() / kWarpSize) + warp()) * kRowsPerWarp;
  int64_t h = first % shape.heads, t = first / shape.heads % shape.T, b = first / shape.heads / shape.T;
  for (int64_t i = 0; i < kRowsPerWarp && b < shape.B; ++i) {
    transform_row<InShared, backward>(pass, f, memory, b, t, h);
    if (++h < shape.heads) continue;
    h = 0;
    if (++t < shape.T) continue;
    t = 0;
    ++b;
  }
}

// Rows of any map that are too large for shared memory; `warps` have room in `rooms`.
template <class T, bool backward>
FWP_KERNEL void transform_large(FWP_PARAMETER Pass pass, T* rooms, int64_t warps) {
  const Shape& shape = pass.shape;
  const int64_t number = static_cast<int64_t>(block_index_x()) * (block_threads() / kWarpSize) + warp();
  for (int64_t row = number; row < shape.B * shape.T * shape.heads; row += warps)
    transform_row<InWorkspace, backward>(pass, pass.features, rooms + number * pass.room.numbers,
                                         row / shape.heads / shape.T, row / shape.heads % shape.T, row % shape.heads);
}

}  // namespace fwp::cuda::features
