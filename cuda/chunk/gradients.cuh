// What a chunk and head give to dq, dk, dbeta and dg, from what the scans saved; every chunk by itself.
//
// Rows are tokens. s is the scale, Gam_ij = exp(G_i - G_j) for j <= i, S0 the state before the chunk, D the adjoint of
// the state after it; E are the errors (linear: V) and dE their adjoints. For the pairs of tokens j <= i, or j < i,
//
//   z_ij = s Gam_ij beta_j <dO_i, E_j>        y_ij = -Gam_ij beta_j <dE_i, E_j>
//
//   dq_i = s e^{G_i} S0 dO_i + sum_j z_ij k_j
//   dk_i = -e^{G_i} S0 dE_i + e^{G_C-G_i} beta_i D E_i + sum_j z_ji q_j + sum_j (y_ij + y_ji) k_j
//   dbeta_i beta_i = e^{G_C-G_i} beta_i k_i.(D E_i) + sum_j (z_ji q_j.k_i + y_ji k_j.k_i)     divided before it is
//   added
//
// A gate g_t decays what goes from tokens before t to tokens from t on, and nothing else:
//
//   dg_t = e^{G_C} <S0, D> + sum_{i>=t} (q_i and k_i times their first terms) + sum_{j<t} (k_j times its second term)
//          + sum_{j<t<=i} (z_ij q_i.k_j + y_ij k_i.k_j)
//
// so that every term has the factor e^{g_t}, and dg keeps its digits however strong the gate is.
#pragma once

#include "backward.cuh"

namespace fwp::cuda::chunk {

constexpr int kGradientThreads = 128;  // a warp for each 16 tokens, which are the rows of its fragments
constexpr int kStateColumns = 64;      // channels of a state in shared memory at a time

template <bool predicts, int D, int V>
struct GradientShared {
  Half q[kChunk * D], k[kChunk * D], e[kChunk * V], d_o[kChunk * V], de[predicts ? kChunk * V : 8];
  union {
    Half state[V * kStateColumns];
    float between[kChunk / 16][kChunk];  // the sums of sum_between, of each warp
  };
  float q_up[kChunk], k_up[kChunk], e_up[kChunk], d_o_up[kChunk], de_up[kChunk];
  float G[2][kChunk];  // in two parts: differences are as good as those of double
  float beta[kChunk], reads[kChunk], writes[kChunk], carried[kChunk / 16];
};

// --- Scores: 16 tokens times the chunk's 64, by a warp ---

constexpr int kBlocks = kChunk / 16;
using Scores = float[kChunk / 8][4];

// f(n, r, i, j) for the numbers [n][r] of a lane, which stand in row i and column j; rows from m on.
template <class F>
FWP_DEVICE void for_each(int m, const F& f) {
  FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
    FWP_UNROLL for (int r = 0; r < 4; ++r) f(n, r, m + lane() / 4 + r / 2 * 8, 8 * n + 2 * (lane() % 4) + r % 2);
  }
}

// x = A B^T, rows m.. of A, for blocks [begin, end) of 16 rows of B; zeros elsewhere.
template <int D>
FWP_DEVICE void dot_rows(Scores& x, const Half* A, const Half* B, int m, int begin, int end) {
  clear(x);
  FWP_UNROLL for (int k = 0; k < D; k += 16) {
    uint32_t a[4];
    load_a<D, Sum::along>(a, A, m, k);
    FWP_UNROLL for (int b = 0; b < kBlocks; ++b) {
      if (b >= begin && b < end) multiply<D, Sum::along, 2>(x + 2 * b, a, B, 16 * b, k);
    }
  }
}

// x = A S, rows m.. of A; S: 64 channels of a state.
template <int V>
FWP_DEVICE void times_state(Scores& x, const Half* A, const Half* S, int m) {
  clear(x);
  FWP_UNROLL for (int k = 0; k < V; k += 16) {
    uint32_t a[4];
    load_a<V, Sum::along>(a, A, m, k);
    multiply<kStateColumns, Sum::down, 8>(x, a, S, 0, k);
  }
}

// x += a B with 64 columns of B, the blocks [begin, end) of its rows; a: scores, rows divided by their scales.
template <int D>
FWP_DEVICE void add_rows(Scores& x, const uint32_t (&a)[kBlocks][4], const Scale (&scale)[2], const Half* B, int column,
                         int begin, int end) {
  Scores y;
  clear(y);
  FWP_UNROLL for (int b = 0; b < kBlocks; ++b) {
    if (b >= begin && b < end) multiply<D, Sum::down, 8>(y, a[b], B, column, 16 * b);
  }
  FWP_UNROLL for (int i = 0; i < kChunk / 2; ++i) x[i / 4][i % 4] += y[i / 4][i % 4] * scale[i % 4 / 2].up;
}

// Rows g and g + 8 of x times a factor each; returned in dots is what they make, over the columns, with rows of B.
template <int D>
FWP_DEVICE void scale_and_dot(Scores& x, const float (&factor)[2], const Half* B, int m, int column, float (&dots)[2]) {
  FWP_UNROLL for (int r = 0; r < 2; ++r) {
    dots[r] = 0;
    FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
      const Half* const from = B + at<D>(m + lane() / 4 + 8 * r, column + 8 * n + 2 * (lane() % 4));
      const uint32_t two = load_shared(reinterpret_cast<const uint32_t*>(from));
      FWP_UNROLL for (int i = 0; i < 2; ++i) {
        x[n][2 * r + i] *= factor[r];
        dots[r] += x[n][2 * r + i] * unpack_half(two, i);
      }
    }
  }
}

// For each t the sum of x_ij over j < t <= i and the rows of this warp, whose blocks from `end` on are zeros.
FWP_DEVICE void sum_between(const Scores& x, int m, int end, float* sums) {
  const int t = lane() % 4;
  float before[2] = {};
  FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
    float sum[2] = {};  // of this lane's columns
    if (n < 2 * end) {
      FWP_UNROLL for (int r = 0; r < 2; ++r) {
        const int i = m + lane() / 4 + 8 * r, column = 8 * n + 2 * t;
        const float first = x[n][2 * r];
        float up_to = first + x[n][2 * r + 1];
        FWP_UNROLL for (int d = 1; d < 4; d *= 2) {
          const float other = shuffle(up_to, (lane() - d) & 31);
          up_to += t >= d ? other : 0.0f;
        }
        const float left = shuffle(up_to, (lane() - 1) & 31), here = before[r] + (t > 0 ? left : 0.0f);
        sum[0] += column <= i ? here : 0.0f;
        sum[1] += column < i ? here + first : 0.0f;
        before[r] += shuffle(up_to, lane() | 3);
      }
      FWP_UNROLL for (int mask = 4; mask < kWarpSize; mask *= 2) {
        FWP_UNROLL for (int c = 0; c < 2; ++c) sum[c] += shuffle_xor(sum[c], mask);
      }
    }
    if (lane() < 4) store_shared(reinterpret_cast<Two*>(sums + 8 * n + 2 * t), Two{{bits_of(sum[0]), bits_of(sum[1])}});
  }
}

// --- States ---

// Channels [column, column + 64) of a saved S^T as a tile [V][64] with one scale, which is returned.
template <int V>
FWP_DEVICE float load_state(const SavedState& x, int column, Half* tile) {
  using Mine = Pieces<kStateColumns, V, kGradientThreads>;
  const Mine mine = Mine::mine();
  const Half* const from = x.numbers + mine.row * x.stride + column + mine.column;
  const int rows = column + mine.column < x.stride ? x.rows : 0;
  FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
    const bool there = mine.row + i * Mine::step < rows;
    copy_async<16>(mine.in(tile, i), there ? from + i * Mine::step * x.stride : x.numbers, there ? 16 : 0);
  }
  commit_copies();
  uint32_t most = 0;
  for (int v = lane(); v < x.rows; v += kWarpSize) most = larger(most, magnitude(load_global(x.up + v)));
  const float up = float_of(largest<kWarpSize>(most));
  wait_copies<0>();
  FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
    if (mine.row + i * Mine::step >= rows || up == 0) continue;
    const float factor = load_global(x.up + mine.row + i * Mine::step) / up;  // of powers of two
    auto* const piece = reinterpret_cast<Quad*>(mine.in(tile, i));
    Quad x8 = load_shared(piece);
    FWP_UNROLL for (int j = 0; j < 4; ++j) x8.x[j] =
        pack_half(unpack_half(x8.x[j], 0) * factor, unpack_half(x8.x[j], 1) * factor);
    store_shared(piece, x8);
  }
  return up;
}

// This thread's part of the products of a saved state's numbers with those of a tile that load_state has made.
template <int V>
FWP_DEVICE float dot_state(const SavedState& x, int column, Half* tile) {
  using Mine = Pieces<kStateColumns, V, kGradientThreads>;
  const Mine mine = Mine::mine();
  const Half* const from = x.numbers + mine.row * x.stride + column + mine.column;
  const int rows = column + mine.column < x.stride ? x.rows : 0;
  float sum = 0;
  FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
    if (mine.row + i * Mine::step >= rows) continue;
    const Quad a = load_shared(reinterpret_cast<const Quad*>(mine.in(tile, i)));
    const Quad b = load_global(reinterpret_cast<const Quad*>(from + i * Mine::step * x.stride));
    float part = 0;
    FWP_UNROLL for (int j = 0; j < 8; ++j) part += unpack_half(a.x[j / 2], j % 2) * unpack_half(b.x[j / 2], j % 2);
    sum += part * load_global(x.up + mine.row + i * Mine::step);
  }
  return sum;
}

// x[16][64] into rows m.. and columns from `column` on, rounded once.
FWP_DEVICE void store_result(const HeadRows& to, int m, int column, const Scores& x) {
  FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) store_fragment(to, m, column + 8 * n, x[n]);
}

// The one number of row i, rounded once.
FWP_DEVICE void store_one(const HeadRows& to, int i, float x) {
  if (i < to.count) store_number(Rows{to.data, to.dtype, 0, 0, 0, 1}, i * to.stride, x);
}

// --- The kernel ---

// The sum over the lanes of a row of fragments.
FWP_DEVICE float sum_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Grid: places, value tiles. Everything is linear in the sums over value columns; a tile has its part of it.
template <bool predicts, int D, int V>
FWP_KERNEL void gradients(FWP_PARAMETER Backward x) {
  const Problem& p = x.p;
  const HeadChunk c = HeadChunk::at(p, x.window, block_index_x());
  if (c.t0 >= c.s.length || load_global(x.left + c.n * p.H + c.h) != 0) return;
  auto& shared = *static_cast<GradientShared<predicts, D, V>*>(shared_memory());

  const int64_t place = block_index_x(), tile = block_index_y(), first = tile * V,
                last = first + V < p.V ? first + V : p.V;
  const auto rows = [&](const Rows& from, int64_t begin, int64_t end) {
    return HeadRows::from(from, Place::of(from, c.s, c.h, begin, end), c.t0, c.tokens());
  };
  const HeadRows q = rows(p.q, 0, p.K), k = rows(p.k, 0, p.K), d_o = rows(p.d_o, first, last);
  const HeadRows e = predicts ? x.E.rows(place, first) : rows(p.v, first, last), de = x.dE.rows(place, first);
  copy_rows<D, kGradientThreads>(q, shared.q);
  copy_rows<D, kGradientThreads>(k, shared.k);
  copy_rows<V, kGradientThreads>(e, shared.e);
  copy_rows<V, kGradientThreads>(d_o, shared.d_o);
  if constexpr (predicts) copy_rows<V, kGradientThreads>(de, shared.de);
  commit_copies();
  if (const int i = thread_index(); i < kChunk) {
    const double G = x.prepared.G != nullptr ? load_global(x.prepared.G + place * kChunk + i) : 0;
    const float high = static_cast<float>(G);
    store_shared(shared.G[0] + i, high);
    store_shared(shared.G[1] + i, static_cast<float>(G - static_cast<double>(high)));
    float beta = i < c.tokens() ? 1.0f : 0.0f;
    if (i < c.tokens() && p.beta.data != nullptr) beta = load_number<float>(p.beta, row_at(p.beta, c.s, c.t0 + i, c.h));
    store_shared(shared.beta + i, beta);
  }
  wait_copies<0>();
  scale_rows<D, kGradientThreads>(q, shared.q, shared.q_up);
  scale_rows<D, kGradientThreads>(k, shared.k, shared.k_up);
  scale_rows<V, kGradientThreads>(e, shared.e, shared.e_up, predicts ? x.E.up(place, first) : nullptr);
  scale_rows<V, kGradientThreads>(d_o, shared.d_o, shared.d_o_up);
  if constexpr (predicts) scale_rows<V, kGradientThreads>(de, shared.de, shared.de_up, x.dE.up(place, first));
  sync_block();

  const int w = warp(), m = 16 * w, g = lane() / 4;
  const auto scale = static_cast<float>(p.scale);
  const auto of = [](const float* numbers, int i) { return load_shared(numbers + i); };
  const auto decay = [&](int from, int to) {  // from a token to one that is not before it
    return exp2f((of(shared.G[0], to) - of(shared.G[0], from)) + (of(shared.G[1], to) - of(shared.G[1], from)));
  };

  float dbeta[2] = {}, between = 0;  // of this lane's rows; of token thread_index()
  uint32_t z_a[kBlocks][4], z_turned_a[kBlocks][4], y_a[kBlocks][4], most = 0;
  Scale z_scale[2], z_turned_scale[2], y_scale[2];
  {
    Scores a, b, sums;
    dot_rows<V>(a, shared.d_o, shared.e, m, 0, w + 1);
    dot_rows<D>(b, shared.q, shared.k, m, 0, w + 1);
    for_each(m, [&](int n, int r, int i, int j) {
      const float up = scale * of(shared.beta, j) * of(shared.d_o_up, i) * of(shared.e_up, j);
      const float z = j <= i ? decay(j, i) * up * a[n][r] : 0.0f;
      sums[n][r] = z * b[n][r] * of(shared.q_up, i) * of(shared.k_up, j);
      a[n][r] = z * of(shared.k_up, j);
    });
    most = larger(most, to_a(z_a, z_scale, a));
    if constexpr (predicts) {
      dot_rows<V>(a, shared.de, shared.e, m, 0, w + 1);
      dot_rows<D>(b, shared.k, shared.k, m, 0, kBlocks);
      for_each(m, [&](int n, int r, int i, int j) {
        const float up = of(shared.beta, j) * of(shared.de_up, i) * of(shared.e_up, j);
        const float y = j < i ? -decay(j, i) * up * a[n][r] : 0.0f;
        sums[n][r] += y * b[n][r] * of(shared.k_up, i) * of(shared.k_up, j);
        a[n][r] = y * of(shared.k_up, j);
      });
    }
    if (p.dg.data != nullptr) sum_between(sums, m, w + 1, shared.between[w]);
    if constexpr (predicts) {
      Scores& later = sums;
      dot_rows<V>(later, shared.e, shared.de, m, w, kBlocks);
      for_each(m, [&](int n, int r, int i, int j) {
        const float up = of(shared.e_up, i) * of(shared.de_up, j);
        const float y = j > i ? -decay(i, j) * up * later[n][r] : 0.0f;
        dbeta[r / 2] += y * b[n][r] * of(shared.k_up, i) * of(shared.k_up, j);
        a[n][r] = j > i ? y * of(shared.beta, i) * of(shared.k_up, j) : a[n][r];
      });
      most = larger(most, to_a(y_a, y_scale, a));
    }
    dot_rows<V>(a, shared.e, shared.d_o, m, w, kBlocks);
    dot_rows<D>(b, shared.k, shared.q, m, w, kBlocks);
    for_each(m, [&](int n, int r, int i, int j) {
      const float up = scale * of(shared.e_up, i) * of(shared.d_o_up, j);
      const float z = j >= i ? decay(i, j) * up * a[n][r] : 0.0f;
      dbeta[r / 2] += z * b[n][r] * of(shared.k_up, i) * of(shared.q_up, j);
      a[n][r] = z * of(shared.beta, i) * of(shared.q_up, j);
    });
    most = larger(most, to_a(z_turned_a, z_turned_scale, a));
  }
  sync_block();
  if (const int t = thread_index(); t < kChunk && p.dg.data != nullptr) {
    FWP_UNROLL for (int i = 0; i < kChunk / 16; ++i) between += load_shared(shared.between[i] + t);
  }
  if (!(most < kInfinite)) raise(x.left + c.n * p.H + c.h);

  const auto result = [&](const Parts& parts, const Rows& sums, int64_t size) {
    const int64_t first_slot = c.slot - c.t0 / kChunk;
    return HeadRows::from(parts.rows(sums), parts.place(sums, p, x.window, c.s, first_slot, c.h, tile, 0, size), c.t0,
                          c.tokens());
  };
  const float to_end = of(shared.G[0], kChunk - 1);
  float read_decay[2], written[2], reads[2] = {}, writes[2] = {}, carried = 0;
  FWP_UNROLL for (int r = 0; r < 2; ++r) {
    read_decay[r] = exp2f(of(shared.G[0], m + g + 8 * r));
    written[r] = decay(m + g + 8 * r, kChunk - 1);
  }
  FWP_UNROLL for (int column = 0; column < D; column += kStateColumns) {
    Scores sum, part;
    float factor[2], dots[2];
    const auto row_factors = [&](const float* up, const float (&decays)[2], float all) {
      FWP_UNROLL for (int r = 0; r < 2; ++r) factor[r] = of(up, m + g + 8 * r) * decays[r] * all;
    };
    const auto add_dots = [&](const float* up, float (&to)[2]) {
      FWP_UNROLL for (int r = 0; r < 2; ++r) to[r] += dots[r] * of(up, m + g + 8 * r);
    };
    sync_block();
    float state_up = load_state<V>(x.S.of(place, first), column, shared.state);
    sync_block();
    times_state<V>(part, shared.d_o, shared.state, m);
    row_factors(shared.d_o_up, read_decay, scale * state_up);
    scale_and_dot<D>(part, factor, shared.q, m, column, dots);
    add_dots(shared.q_up, reads);
    add_rows<D>(part, z_a, z_scale, shared.k, column, 0, w + 1);
    if (p.dq.data != nullptr) store_result(result(x.dq, p.dq, p.K), m, column, part);

    if constexpr (predicts) {
      times_state<V>(sum, shared.de, shared.state, m);
      row_factors(shared.de_up, read_decay, -state_up);
      scale_and_dot<D>(sum, factor, shared.k, m, column, dots);
      add_dots(shared.k_up, reads);
    } else {
      clear(sum);
    }
    sync_block();
    state_up = load_state<V>(x.D.of(place, first), column, shared.state);
    if (p.dg.data != nullptr) carried += dot_state<V>(x.S.of(place, first), column, shared.state) * state_up;
    sync_block();
    times_state<V>(part, shared.e, shared.state, m);
    row_factors(shared.e_up, written, state_up);
    scale_and_dot<D>(part, factor, shared.k, m, column, dots);
    add_dots(shared.k_up, writes);
    for_each(m, [&](int n, int r, int i, int) { sum[n][r] += part[n][r] * of(shared.beta, i); });
    add_rows<D>(sum, z_turned_a, z_turned_scale, shared.q, column, w, kBlocks);
    if constexpr (predicts) add_rows<D>(sum, y_a, y_scale, shared.k, column, 0, kBlocks);
    if (p.dk.data != nullptr) store_result(result(x.dk, p.dk, p.K), m, column, sum);
  }

  FWP_UNROLL for (int r = 0; r < 2; ++r) {
    const int i = m + g + 8 * r;
    writes[r] = sum_row(writes[r]);
    const float all = sum_row(dbeta[r]) + writes[r];
    if (p.dbeta.data != nullptr && lane() % 4 == 0) store_one(result(x.dbeta, p.dbeta, 1), i, all);
  }
  if (p.dg.data == nullptr) return;
  FWP_UNROLL for (int r = 0; r < 2; ++r) {
    const int i = m + g + 8 * r;
    reads[r] = sum_row(reads[r]);
    if (lane() % 4 != 0) continue;
    store_shared(shared.reads + i, reads[r]);
    store_shared(shared.writes + i, writes[r] * of(shared.beta, i));
  }
  FWP_UNROLL for (int mask = 16; mask > 0; mask /= 2) carried += shuffle_xor(carried, mask);
  if (lane() == 0) store_shared(shared.carried + w, carried);
  sync_block();
  const int t = thread_index();
  if (t >= kChunk) return;
  float dg = 0;
  FWP_UNROLL for (int i = 0; i < kChunk / 16; ++i) dg += load_shared(shared.carried + i);
  dg = dg * exp2f(to_end) + between;
  for (int i = 0; i < kChunk; ++i) dg += load_shared((i < t ? shared.writes : shared.reads) + i);
  store_one(result(x.dg, p.dg, 1), t, dg);
}

}  // namespace fwp::cuda::chunk
