#include "channels.cuh"
#include "inverse.cuh"

namespace fwp::cuda::chunk {
namespace {

template <int D, bool predicts>
struct ChannelShared {
  static constexpr int rows_of_k = predicts ? kChunk : 0;
  union {
    struct {
      Half q[kChunk * D], k[rows_of_k * D + 8];  // decayed from the begin of their block
    };
    float square[predicts ? kChunk * kChunk : 1];
  };
  Half columns[kPairs * kBlock * D];  // k of J decayed up to the begin of I
  float q_up[kChunk], k_up[kChunk], columns_up[kPairs * kBlock], beta[kChunk];
  float decay[kBlocks][D], growth[kBlocks][D];  // of the blocks
  float P[kBlocks][kBlock * kBlock], M[kBlocks][kBlock * kBlock];
};

// A row of float16 numbers with its scale, n of them in each lane of a warp.
template <int n>
struct PackedRow {
  uint32_t two[(n + 1) / 2], most;
  float up;

  FWP_DEVICE static PackedRow of(const float (&x)[n]) {
    PackedRow row;
    row.most = 0;
    FWP_UNROLL for (int c = 0; c < n; ++c) row.most = larger(row.most, magnitude(x[c]));
    row.most = largest<kWarpSize>(row.most);
    const Scale scale = scale_for(row.most);
    FWP_UNROLL for (int c = 0; c < n; c += 2) row.two[c / 2] =
        pack_half(x[c] * scale.down, c + 1 < n ? x[c + 1] * scale.down : 0.0f);
    row.up = scale.up;
    return row;
  }
  template <class Store>
  FWP_DEVICE void store(Half* to, float* to_up, const Store& put) const {
    if constexpr (n == 1) put(to, Half{static_cast<uint16_t>(two[0])});
    if constexpr (n == 2) put(reinterpret_cast<uint32_t*>(to), two[0]);
    if constexpr (n == 4) put(reinterpret_cast<Two*>(to), Two{{two[0], two[1]}});
    if (lane() == 0) put(to_up, up);
  }
  template <int D>
  FWP_DEVICE void to_tile(Half* tile, float* ups, int row) const {
    store(tile + at<D>(row, n * lane()), ups + row, [](auto* to, auto x) { store_shared(to, x); });
  }
  FWP_DEVICE void to_rows(const PreparedRows& rows, int64_t token) const {
    store(rows.numbers + (token * kWarpSize + lane()) * n, rows.up + token,
          [](auto* to, auto x) { store_global(to, x); });
  }
};

// Grid: places.
template <int D, bool predicts>
FWP_KERNEL void prepare_by_channel(FWP_PARAMETER Problem p, Window window, Prepared out, int32_t* left) {
  constexpr int n = D / kWarpSize;  // channels of a lane
  const int64_t place = block_index_x();
  const HeadChunk chunk = HeadChunk::at(p, window, block_index_x());
  if (chunk.t0 >= chunk.s.length) return;
  auto& shared = *static_cast<ChannelShared<D, predicts>*>(shared_memory());
  const int block = warp(), first = block * kBlock, column = n * lane();
  const auto rows = [&](const Rows& from) {
    return HeadRows::from(from, Place::of(from, chunk.s, chunk.h, 0, p.K), chunk.t0, chunk.tokens());
  };
  const HeadRows q_rows = rows(p.q), k_rows = rows(p.k), g_rows = rows(p.g);
  const auto load_decays = [&](float (&a)[n], int i) {
    load_channels(a, g_rows, first + i, column);
    FWP_UNROLL for (int c = 0; c < n; ++c) a[c] = exponential(a[c]);
  };

  {
    float decay[n], growth[n] = {};
    FWP_UNROLL for (int c = 0; c < n; ++c) decay[c] = 1;
    FWP_UNROLL_BY(4) for (int i = 0; i < kBlock; ++i) {
      float g[n];
      load_channels(g, g_rows, first + i, column);
      FWP_UNROLL for (int c = 0; c < n; ++c) {
        decay[c] *= exponential(g[c]);
        growth[c] += g[c] < 0 ? 0.0f : g[c];
      }
    }
    FWP_UNROLL for (int c = 0; c < n; ++c) {
      store_shared(shared.decay[block] + column + c, decay[c]);
      store_shared(shared.growth[block] + column + c, growth[c]);
    }
  }
  if (const int i = thread_index(); predicts && i < kChunk)
    store_shared(shared.beta + i, i < chunk.tokens()
                                      ? load_number<float>(p.beta, row_at(p.beta, chunk.s, chunk.t0 + i, chunk.h))
                                      : 0.0f);
  sync_block();

  bool fine = true;
  float before[n], after[n];  // decays of the blocks before this one, and of those after it
  FWP_UNROLL for (int c = 0; c < n; ++c) {
    float growth = 0;
    before[c] = after[c] = 1;
    FWP_UNROLL for (int b = 0; b < kBlocks; ++b) {
      growth += load_shared(shared.growth[b] + column + c);
      const float decay = load_shared(shared.decay[b] + column + c);
      if (b < block) before[c] *= decay;
      if (b > block) after[c] *= decay;
    }
    if (!(growth <= kMostChannelGrowth)) fine = false;
  }
  uint32_t most = 0;
  float written[kBlock][n], decay[n];  // rows of k decayed up to token i; from the begin of the block to there
  FWP_UNROLL for (int c = 0; c < n; ++c) decay[c] = 1;
  FWP_UNROLL for (int i = 0; i < kBlock; ++i) {
    float a[n], q[n], k[n], pairs[32] = {};
    load_decays(a, i);
    load_channels(q, q_rows, first + i, column);
    load_channels(k, k_rows, first + i, column);
    FWP_UNROLL for (int c = 0; c < n; ++c) {
      decay[c] *= a[c];
      FWP_UNROLL for (int j = 0; j < kBlock; ++j) {
        if (j < i) written[j][c] *= a[c];
        if (j == i) written[j][c] = k[c];
        if (j <= i) pairs[j] += q[c] * written[j][c];
        if (predicts && j < i) pairs[i + 1 + j] += k[c] * written[j][c];
      }
    }
    float few[16];
    FWP_UNROLL for (int j = 0; j < 16; ++j) few[j] = pairs[j];
    const float sum = i < 8 ? sum_over_lanes(few) : sum_over_lanes(pairs);
    if (const int j = lane(); j <= i)
      store_shared(shared.P[block] + i * kBlock + j, sum);
    else if (predicts && j <= 2 * i)
      store_shared(shared.M[block] + i * kBlock + j - i - 1, sum);

    const auto reads = [&](const float (&x)[n], Half* tile, float* ups, const PreparedRows& to) {
      float y[n];
      FWP_UNROLL for (int c = 0; c < n; ++c) y[c] = x[c] * decay[c];
      PackedRow<n>::of(y).template to_tile<D>(tile, ups, first + i);
      FWP_UNROLL for (int c = 0; c < n; ++c) {
        most = larger(most, magnitude(x[c]));
        y[c] *= before[c];
      }
      const auto row = PackedRow<n>::of(y);
      most = larger(most, row.most);
      row.to_rows(to, place * kChunk + first + i);
    };
    reads(q, shared.q, shared.q_up, out.reads_q);
    if constexpr (predicts) reads(k, shared.k, shared.k_up, out.reads_k);
  }
  FWP_UNROLL for (int j = 0; j < kBlock; ++j) {
    float y[n];
    FWP_UNROLL for (int c = 0; c < n; ++c) y[c] = written[j][c] * after[c];
    const auto row = PackedRow<n>::of(y);
    most = larger(most, row.most);
    row.to_rows(out.writes, place * kChunk + first + j);
    FWP_UNROLL for (int I = 1; I < kBlocks; ++I) {
      if (I <= block) continue;
      PackedRow<n>::of(written[j])
          .template to_tile<D>(shared.columns, shared.columns_up, pair_of(I, block) * kBlock + j);
      FWP_UNROLL for (int c = 0; c < n; ++c) written[j][c] *= load_shared(shared.decay[I] + column + c);
    }
  }
  if (block == 0) {
    FWP_UNROLL for (int c = 0; c < n; ++c)
        store_global(out.decay + place * D + column + c, after[c] * load_shared(shared.decay[0] + column + c));
  }
  sync_block();

  // Sixteen rows of P and of M diag(beta), for each warp its block's
  const int g = lane() / 4, t = lane() % 4;
  const auto multiply_pairs = [&](float (&x)[8][4], const Half* tile, const float* ups, const float* diagonal,
                                  int end) {
    clear(x);
    FWP_UNROLL for (int depth = 0; depth < D; depth += 16) {
      uint32_t a[4];
      load_a<D, Sum::along>(a, tile, first, depth);
      FWP_UNROLL for (int J = 0; J < kBlocks - 1; ++J) {
        if (J < block) multiply<D, Sum::along, 2>(x + 2 * J, a, shared.columns, pair_of(block, J) * kBlock, depth);
      }
    }
    FWP_UNROLL for (int n8 = 0; n8 < 8; ++n8) {
      FWP_UNROLL for (int r = 0; r < 4; ++r) {
        const int i = g + 8 * (r / 2), j = 8 * (n8 % 2) + 2 * t + r % 2, J = n8 / 2;
        if (J < block)
          x[n8][r] *= load_shared(ups + first + i) * load_shared(shared.columns_up + pair_of(block, J) * kBlock + j);
        if (J == block) x[n8][r] = j < i + end ? load_shared(diagonal + i * kBlock + j) : 0.0f;
      }
    }
  };
  float x[8][4];
  multiply_pairs(x, shared.q, shared.q_up, shared.P[block], 1);
  uint32_t P[4][4];
  Scale scale[2];
  most = larger(most, to_a(P, scale, x));
  FWP_UNROLL for (int k = 0; k < 4; ++k)
      store_a(out.P.numbers + (place * kChunk + first) * kChunk, kChunk, 16 * k, P[k]);
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    if (t == 0) store_global(out.P.up + place * kChunk + first + g + 8 * i, scale[i].up);
  }
  if constexpr (predicts) {
    multiply_pairs(x, shared.k, shared.k_up, shared.M[block], 0);
    sync_block();  // the tiles are no longer needed
    FWP_UNROLL for (int n8 = 0; n8 < 8; ++n8) {
      if (n8 / 2 > block) continue;
      FWP_UNROLL for (int r = 0; r < 4; ++r) x[n8][r] *= load_shared(shared.beta + 8 * n8 + 2 * t + r % 2);
      store_block<1>(shared.square, first, 8 * n8, x + n8, 1);
    }
    sync_warp();
    invert(shared.square);
    store_inverse(shared.square, out.T.numbers + place * kChunk * kChunk, out.T.up + place * kChunk);
  }
  if (!fine || most >= kInfinite) raise(left + chunk.n * p.H + chunk.h);
}

}  // namespace

void prepare_channels(const Problem& p, const Window& window, const Prepared& out, int32_t* left, Queue& queue) {
  const Grid grid{places(p, window)};
  with_size(p.K, [&](auto size) {
    const auto start = [&](auto predicts) {
      queue.run("chunk prepare", prepare_by_channel<size(), predicts()>, grid, kPrepThreads,
                shared_of<ChannelShared<size(), predicts()>, 2>(), p, window, out, left);
    };
    p.rule == Rule::delta ? start(std::true_type()) : start(std::false_type());
  });
}

}  // namespace fwp::cuda::chunk
