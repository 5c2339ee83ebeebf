#include "gradients.cuh"

namespace fwp::cuda::chunk {

void run_gradients(const Backward& x, Queue& queue) {
  const Problem& p = x.p;
  if (p.decay == Decay::channel) return run_channel_gradients(x, queue);
  const Grid grid{places(p, x.window), value_tiles(p)};
  const auto start = [&](auto predicts, auto keys, auto values) {
    queue.run("chunk gradients", gradients<predicts(), keys(), values()>, grid, kGradientThreads,
              shared_of<GradientShared<predicts(), keys(), values()>, 2>(), x);
  };
  const auto with = [&](auto predicts) {
    const std::integral_constant<int, 64> few{};
    const std::integral_constant<int, 128> many{};
    if (p.K <= 64)
      p.V <= 64 ? start(predicts, few, few) : start(predicts, few, many);
    else
      p.V <= 64 ? start(predicts, many, few) : start(predicts, many, many);
  };
  p.rule == Rule::delta ? with(std::true_type()) : with(std::false_type());
}

}  // namespace fwp::cuda::chunk
