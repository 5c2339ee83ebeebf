#include "features.cuh"

namespace fwp::cuda::features {
namespace {

template <class T, Map map, bool backward>
void run(Pass pass, Queue& queue) {
  constexpr int64_t kWarps = 4;
  const auto most = static_cast<int64_t>(most_shared_bytes());
  const Features& f = pass.features;
  pass.room = Room::of<T>(f, backward);
  const int64_t bytes = pass.room.numbers * static_cast<int64_t>(sizeof(T));
  if (bytes > most)
    throw Error("feature map: a row of " + std::to_string(f.inputs) + " numbers with " + std::to_string(f.outputs) +
                " features takes " + std::to_string(bytes) + " bytes of shared memory, more than " +
                std::to_string(most));
  const int64_t warps = bytes * kWarps <= most ? kWarps : 1;
  const int64_t rows = pass.shape.B * pass.shape.T * pass.shape.heads, of_block = warps * kRowsPerWarp;
  queue.run(backward ? "feature map, backward" : "feature map", transform<T, map, backward>,
            {(rows + of_block - 1) / of_block}, static_cast<int>(warps * kWarpSize), static_cast<size_t>(warps * bytes),
            pass);
}

template <class T, bool backward>
void run_map(const Pass& pass, Queue& queue) {
  switch (pass.features.map) {
    case Map::none:
      return run<T, Map::none, backward>(pass, queue);
    case Map::relu:
      return run<T, Map::relu, backward>(pass, queue);
    case Map::elu1:
      return run<T, Map::elu1, backward>(pass, queue);
    case Map::softmax:
      return run<T, Map::softmax, backward>(pass, queue);
    case Map::dpfp:
      return run<T, Map::dpfp, backward>(pass, queue);
    case Map::favor:
      return run<T, Map::favor, backward>(pass, queue);
  }
}

template <bool backward>
void run_any(const Pass& pass, Queue& queue) {
  if ((backward ? pass.features.inputs : pass.features.outputs) == 0) return;
  pass.x.dtype == DType::f64 ? run_map<double, backward>(pass, queue) : run_map<float, backward>(pass, queue);
}

}  // namespace

void forward(const Features& f, const Shape& shape, const Rows& x, const Rows& y, Queue& queue) {
  run_any<false>({f, shape, {}, x, y, {}, {}}, queue);
}

void backward(const Features& f, const Shape& shape, const Rows& dy, const Rows& x, const Rows& dx, Queue& queue) {
  run_any<true>({f, shape, {}, x, {}, dy, dx}, queue);
}

}  // namespace fwp::cuda::features
