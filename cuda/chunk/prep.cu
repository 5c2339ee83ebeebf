#include "inverse.cuh"
#include "prep.cuh"

namespace fwp::cuda::chunk {
namespace {

// --- Gates ---

constexpr double kLog2E = 1.4426950408889634;
// A gate below this makes any decay 0, and as -1e4 still does, sums of a chunk stay exact to 1e-10: -inf is a reset.
constexpr double kWeakest = -1e4;

// By one warp: G of a chunk's tokens, to global memory and to `shared` [64]. Returns the growth, NaN if a gate is that.
FWP_DEVICE float sum_gates(const Problem& p, const Sequence& s, int64_t t0, int64_t h, double* G, double* shared) {
  double sums[2];
  float growth = 0;
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    const int64_t t = t0 + 2 * lane() + i;
    const double g = t < s.length ? load_number<double>(p.g, row_at(p.g, s, t, h)) : 0;
    growth += static_cast<float>(g < 0 ? 0 : g);
    sums[i] = (g < kWeakest ? kWeakest : g) * kLog2E;
  }
  sums[1] += sums[0];
  double before = sums[1];
  FWP_UNROLL for (int d = 1; d < kWarpSize; d *= 2) {
    const double other = shuffle(before, (lane() - d) & 31);
    if (lane() >= d) before += other;
  }
  before = shuffle(before, (lane() - 1) & 31);
  if (lane() == 0) before = 0;
  const Numbers<double> two{{before + sums[0], before + sums[1]}};
  store_shared(reinterpret_cast<Numbers<double>*>(shared) + lane(), two);
  store_global(reinterpret_cast<Numbers<double>*>(G) + lane(), two);
  FWP_UNROLL for (int mask = 16; mask > 0; mask /= 2) growth += shuffle_xor(growth, mask);
  return growth;
}

// --- Kernels ---

template <int D>
struct PrepShared {
  Half k[kChunk * D];
  float square[kChunk * kChunk];
  double G[kChunk];
  float k_up[kChunk], beta[kChunk];
};

// Grid: places.
template <int D>
FWP_KERNEL void prepare_delta(FWP_PARAMETER Problem p, Window window, Prepared out, int32_t* left) {
  const int64_t place = block_index_x();
  const auto [n, h, t0, slot, s] = HeadChunk::at(p, window, block_index_x());
  if (t0 >= s.length) return;
  auto& shared = *static_cast<PrepShared<D>*>(shared_memory());
  const bool gated = p.decay != Decay::none;

  const auto k = HeadRows::from(p.k, Place::of(p.k, s, h, 0, p.K), t0, tokens_of_chunk(s, t0 / kChunk));
  copy_rows<D, kPrepThreads>(k, shared.k);
  commit_copies();
  bool fine = true;
  if (gated && warp() == 0) fine = sum_gates(p, s, t0, h, out.G + place * kChunk, shared.G) <= kMostGrowth;
  if (const int i = thread_index() - kWarpSize; i >= 0 && i < kChunk)
    store_shared(shared.beta + i, t0 + i < s.length ? load_number<float>(p.beta, row_at(p.beta, s, t0 + i, h)) : 0.0f);
  wait_copies<0>();
  if (scale_rows<D, kPrepThreads>(k, shared.k, shared.k_up) >= kInfinite) fine = false;
  if (!fine) raise(left + n * p.H + h);
  sync_block();

  // M diag(beta), sixteen rows for each warp
  const int row = 16 * warp();
  float d[8][4] = {};
  FWP_UNROLL for (int depth = 0; depth < D; depth += 16) {
    uint32_t a[4];
    load_a<D, Sum::along>(a, shared.k, row, depth);
    FWP_UNROLL for (int block = 0; block < 4; ++block) {
      if (block > warp()) continue;
      multiply<D, Sum::along, 2>(d + 2 * block, a, shared.k, 16 * block, depth);
    }
  }
  FWP_UNROLL for (int n8 = 0; n8 < 8; ++n8) {
    if (n8 / 2 > warp()) continue;
    FWP_UNROLL for (int r = 0; r < 4; ++r) {
      const int i = row + lane() / 4 + 8 * (r / 2), j = 8 * n8 + 2 * (lane() % 4) + r % 2;
      const float both = load_shared(shared.k_up + i) * load_shared(shared.k_up + j) * load_shared(shared.beta + j);
      float decay = 1;
      if (gated && j < i) decay = exp2f(static_cast<float>(load_shared(shared.G + i) - load_shared(shared.G + j)));
      d[n8][r] = j < i ? d[n8][r] * both * decay : 0.0f;
    }
    store_block<1>(shared.square, row, 8 * n8, d + n8, 1);
  }
  sync_warp();
  invert(shared.square);

  store_inverse(shared.square, out.T.numbers + place * kChunk * kChunk, out.T.up + place * kChunk);
}

// For rules that do not predict: the gates alone, a warp for a slot and head.
FWP_KERNEL void prepare_gates(FWP_PARAMETER Problem p, Window window, Prepared out, int32_t* left) {
  const int64_t place = block_index_x();
  const auto [n, h, t0, slot, s] = HeadChunk::at(p, window, block_index_x());
  if (t0 >= s.length) return;
  auto* const G = static_cast<double*>(shared_memory());
  if (!(sum_gates(p, s, t0, h, out.G + place * kChunk, G) <= kMostGrowth)) raise(left + n * p.H + h);
}

}  // namespace

void prepare(const Problem& p, const Window& window, const Prepared& out, int32_t* left, Queue& queue) {
  if (p.decay == Decay::channel) return prepare_channels(p, window, out, left, queue);
  const Grid grid{places(p, window)};
  if (p.rule == Rule::delta)
    with_size(p.K, [&](auto size) {
      queue.run("chunk prepare", prepare_delta<size()>, grid, kPrepThreads, shared_of<PrepShared<size()>, 4>(), p,
                window, out, left);
    });
  else if (p.decay != Decay::none)
    queue.run("chunk gates", prepare_gates, grid, kWarpSize, kChunk * sizeof(double), p, window, out, left);
}

}  // namespace fwp::cuda::chunk
