#include <algorithm>

#include "features.cuh"

namespace fwp::cuda::features {
namespace {

constexpr int64_t kWarps = 4;  // of a block

template <class T>
int64_t bytes_of_row(const Features& f, bool backward) {
  return Room::of<T>(f, backward).numbers * static_cast<int64_t>(sizeof(T));
}
// Blocks for rows that are too large for shared memory.
int64_t blocks_of_large(int64_t bytes_of_row) {
  constexpr int64_t kMost = 64, kMostBytes = 64 << 20;
  return std::clamp<int64_t>(kMostBytes / (kWarps * bytes_of_row), 1, kMost);
}

template <class T, Map map, bool backward>
void run(const Pass& pass, void* workspace, Queue& queue) {
  constexpr const char* kName = backward ? "feature map, backward" : "feature map";
  const auto most = static_cast<int64_t>(most_shared_bytes()), bytes = bytes_of_row<T>(pass.features, backward);
  const int64_t rows = pass.shape.B * pass.shape.T * pass.shape.heads;
  if (bytes > most) {
    const int64_t blocks = blocks_of_large(bytes);
    queue.run(kName, transform_large<T, backward>, {blocks}, static_cast<int>(kWarps * kWarpSize), 0, pass,
              static_cast<T*>(workspace), blocks * kWarps);
    return;
  }
  const int64_t warps = bytes * kWarps <= most ? kWarps : 1, of_block = warps * kRowsPerWarp;
  queue.run(kName, transform<T, map, backward>, {(rows + of_block - 1) / of_block}, static_cast<int>(warps * kWarpSize),
            static_cast<size_t>(warps * bytes), pass);
}

template <class T, bool backward>
void run_map(Pass pass, void* workspace, Queue& queue) {
  pass.room = Room::of<T>(pass.features, backward);
  switch (pass.features.map) {
    case Map::none:
      return run<T, Map::none, backward>(pass, workspace, queue);
    case Map::relu:
      return run<T, Map::relu, backward>(pass, workspace, queue);
    case Map::elu1:
      return run<T, Map::elu1, backward>(pass, workspace, queue);
    case Map::softmax:
      return run<T, Map::softmax, backward>(pass, workspace, queue);
    case Map::dpfp:
      return run<T, Map::dpfp, backward>(pass, workspace, queue);
    case Map::favor:
      return run<T, Map::favor, backward>(pass, workspace, queue);
  }
}

template <bool backward>
void run_any(const Pass& pass, void* workspace, Queue& queue) {
  if ((backward ? pass.features.inputs : pass.features.outputs) == 0) return;
  pass.x.dtype == DType::f64 ? run_map<double, backward>(pass, workspace, queue)
                             : run_map<float, backward>(pass, workspace, queue);
}

}  // namespace

size_t workspace(const Features& f, DType accumulation, int device, bool backward) {
  const int64_t bytes =
      accumulation == DType::f64 ? bytes_of_row<double>(f, backward) : bytes_of_row<float>(f, backward);
  if (bytes <= static_cast<int64_t>(most_shared_bytes(device))) return 0;
  return static_cast<size_t>(blocks_of_large(bytes) * kWarps * bytes);
}

void forward(const Features& f, const Shape& shape, const Rows& x, const Rows& y, void* workspace, Queue& queue) {
  run_any<false>({f, shape, {}, x, y, {}, {}}, workspace, queue);
}

void backward(const Features& f, const Shape& shape, const Rows& dy, const Rows& x, const Rows& dx, void* workspace,
              Queue& queue) {
  run_any<true>({f, shape, {}, x, {}, dy, dx}, workspace, queue);
}

}  // namespace fwp::cuda::features
