#include "channel_gradients.cuh"

namespace fwp::cuda::chunk {

void run_channel_gradients(const Backward& x, Queue& queue) {
  const Problem& p = x.p;
  const Grid grid{places(p, x.window), value_tiles(p)};
  const auto start = [&](auto predicts) {
    const auto multiply = [&](auto values) {
      queue.run("chunk products", multiply_values<predicts(), values()>, grid, kGradientThreads,
                shared_of<ProductShared<predicts(), values()>, 3>(), x);
    };
    p.V <= 64 ? multiply(std::integral_constant<int, 64>()) : multiply(std::integral_constant<int, 128>());
    queue.run("chunk channel gradients", gradients_by_channel<predicts()>, grid, kGradientThreads,
              shared_of<ChannelGradientShared<predicts()>, 2>(), x);
  };
  p.rule == Rule::delta ? start(std::true_type()) : start(std::false_type());
}

}  // namespace fwp::cuda::chunk
