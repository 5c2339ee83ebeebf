#include "prep.cuh"

namespace fwp::cuda::chunk {
namespace {

// --- Gates ---

constexpr double kLog2E = 1.4426950408889634;
// A gate below this makes any decay 0, and as -1e4 still does, sums of a chunk stay exact to 1e-10: -inf is a reset.
constexpr double kWeakest = -1e4;
// Growth, as the sum of a chunk's gates above 0, up to which float16 operands are good enough.
constexpr float kMostGrowth = 8;

struct alignas(16) TwoSums {
  double x[2];
};

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
  const TwoSums two{{before + sums[0], before + sums[1]}};
  store_shared(reinterpret_cast<TwoSums*>(shared) + lane(), two);
  store_global(reinterpret_cast<TwoSums*>(G) + lane(), two);
  FWP_UNROLL for (int mask = 16; mask > 0; mask /= 2) growth += shuffle_xor(growth, mask);
  return growth;
}

// --- The inverse ---

// A square [64][64] of float32 in shared memory without bank conflicts for fragments of either operand.
FWP_DEVICE int square_at(int row, int column) { return row * kChunk + (column ^ (row % 4 * 8 + row / 4 % 2 * 4)); }

// d[16][8N] += A[16][16] B[16][8N] of blocks of squares, near float32: each operand as a sum of two numbers of tf32.
template <int N>
FWP_DEVICE void multiply_blocks(float (*d)[4], const float* square, int a_row, int a_column, int b_row, int b_column) {
  const int g = lane() / 4, t = lane() % 4;
  const auto split = [&](int row, int column, uint32_t& high, uint32_t& low) {
    const float x = load_shared(square + square_at(row, column));
    high = to_tf32(x);
    low = to_tf32(x - float_of(high));
  };
  FWP_UNROLL for (int k = 0; k < 16; k += 8) {
    uint32_t a[4], a_low[4];
    FWP_UNROLL for (int r = 0; r < 4; ++r)
        split(a_row + g + 8 * (r % 2), a_column + k + t + 4 * (r / 2), a[r], a_low[r]);
    FWP_UNROLL for (int n = 0; n < N; ++n) {
      uint32_t b[2], b_low[2];
      FWP_UNROLL for (int r = 0; r < 2; ++r) split(b_row + k + t + 4 * r, b_column + 8 * n + g, b[r], b_low[r]);
      mma_tf32(d[n], a_low, b);
      mma_tf32(d[n], a, b_low);
      mma_tf32(d[n], a, b);
    }
  }
}

template <int N>
FWP_DEVICE void store_block(float* square, int row, int column, const float (*d)[4], float sign) {
  FWP_UNROLL for (int n = 0; n < N; ++n) {
    FWP_UNROLL for (int i = 0; i < 2; ++i) {
      float* const to = square + square_at(row + lane() / 4 + 8 * i, column + 8 * n + 2 * (lane() % 4));
      store_shared(reinterpret_cast<Two*>(to), Two{{bits_of(sign * d[n][2 * i]), bits_of(sign * d[n][2 * i + 1])}});
    }
  }
}

// By a warp: L becomes (I + L)^-1 in a diagonal block of 16, L strictly lower. A lane has a column, by substitution.
FWP_DEVICE void invert_diagonal(float* square, int begin) {
  const int column = lane() % 16;
  float x[16];
  FWP_UNROLL for (int i = 0; i < 16; ++i) {
    x[i] = i == column ? 1.0f : 0.0f;
    FWP_UNROLL for (int j = 0; j < i; j += 4) {
      const Quad four = load_shared(reinterpret_cast<const Quad*>(square + square_at(begin + i, begin + j)));
      FWP_UNROLL for (int l = 0; l < 4; ++l) if (j + l < i) x[i] -= float_of(four.x[l]) * x[j + l];
    }
  }
  sync_warp();
  FWP_UNROLL for (int i = 0; i < 16; ++i) {
    if (lane() < 16) store_shared(square + square_at(begin + i, begin + column), x[i]);
  }
}

// By four warps: L becomes (I + L)^-1 below its diagonal blocks, that of a half by X21 = -X22 (L21 X11). Never by a
// Neumann series: its terms grow where the inverse is small, as for keys that are much alike.
FWP_DEVICE void invert(float* square) {
  invert_diagonal(square, 16 * warp());
  sync_block();
  {  // two halves of 32; a warp has 8 columns
    const int begin = 32 * (warp() / 2), column = begin + 8 * (warp() % 2);
    float y[1][4] = {}, x[1][4] = {};
    multiply_blocks<1>(y, square, begin + 16, begin, begin, column);
    sync_block();
    store_block<1>(square, begin + 16, column, y, 1);
    sync_block();
    multiply_blocks<1>(x, square, begin + 16, begin + 16, begin + 16, column);
    sync_block();
    store_block<1>(square, begin + 16, column, x, -1);
    sync_block();
  }
  // the whole; a warp has 16 rows and columns
  const int i = warp() / 2, j = warp() % 2, row = 32 + 16 * i, column = 16 * j;
  float y[2][4] = {}, x[2][4] = {};
  for (int k = j; k < 2; ++k) multiply_blocks<2>(y, square, row, 16 * k, 16 * k, column);
  sync_block();
  store_block<2>(square, row, column, y, 1);
  sync_block();
  for (int k = 0; k <= i; ++k) multiply_blocks<2>(x, square, row, 32 + 16 * k, 32 + 16 * k, column);
  sync_block();
  store_block<2>(square, row, column, x, -1);
  sync_block();
}

// --- Kernels ---

constexpr int kPrepThreads = 128;

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

  // T', four numbers of a row for each lane
  constexpr int lanes = kChunk / 4, step = kPrepThreads / lanes;
  const int j = thread_index() % lanes * 4;
  FWP_UNROLL for (int first = 0; first < kChunk; first += step) {
    const int i = first + thread_index() / lanes;
    const Quad four = load_shared(reinterpret_cast<const Quad*>(shared.square + square_at(i, j)));
    float x[4];
    uint32_t most = 0;
    FWP_UNROLL for (int l = 0; l < 4; ++l) {
      x[l] = j + l <= i ? float_of(four.x[l]) : 0.0f;
      most = larger(most, magnitude(x[l]));
    }
    const Scale scale = scale_for(largest<lanes>(most));
    const Two halves{
        {pack_half(x[0] * scale.down, x[1] * scale.down), pack_half(x[2] * scale.down, x[3] * scale.down)}};
    store_global(reinterpret_cast<Two*>(out.T + (place * kChunk + i) * kChunk + j), halves);
    if (j == 0) store_global(out.T_up + place * kChunk + i, scale.up);
  }
}

// For rules that do not predict: the gates alone, a warp for a slot and head.
FWP_KERNEL void prepare_gates(FWP_PARAMETER Problem p, Window window, Prepared out, int32_t* left) {
  const int64_t place = block_index_x();
  const auto [n, h, t0, slot, s] = HeadChunk::at(p, window, block_index_x());
  if (t0 >= s.length) return;
  auto* const G = static_cast<double*>(shared_memory());
  if (!(sum_gates(p, s, t0, h, out.G + place * kChunk, G) <= kMostGrowth)) raise(left + n * p.H + h);
}

constexpr int kClearThreads = 128;

FWP_KERNEL void clear_flags(int32_t* flags, int64_t count) {
  const int64_t i = static_cast<int64_t>(block_index_x()) * kClearThreads + thread_index();
  if (i < count) store_global(flags + i, int32_t{0});
}

}  // namespace

void clear_left(const Problem& p, int32_t* left, Queue& queue) {
  const int64_t heads = p.N * p.H;
  queue.run("chunk flags", clear_flags, {static_cast<unsigned>((heads + kClearThreads - 1) / kClearThreads)},
            kClearThreads, 0, left, heads);
}

void prepare(const Problem& p, const Window& window, const Prepared& out, int32_t* left, Queue& queue) {
  const Grid grid{static_cast<unsigned>(places(p, window))};
  if (p.rule == Rule::delta)
    with_size(p.K, [&](auto size) {
      queue.run("chunk prepare", prepare_delta<size()>, grid, kPrepThreads, sizeof(PrepShared<size()>), p, window, out,
                left);
    });
  else if (p.decay != Decay::none)
    queue.run("chunk gates", prepare_gates, grid, kWarpSize, kChunk * sizeof(double), p, window, out, left);
}

}  // namespace fwp::cuda::chunk
