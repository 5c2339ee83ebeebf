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
constexpr int kSlice = 32;             // channels of a state in shared memory at a time

template <bool predicts, int D, int V>
struct GradientShared {
  Half q[kChunk * D], k[kChunk * D], e[kChunk * V], d_o[kChunk * V], de[predicts ? kChunk * V : 8];
  Half state[V * kSlice], adjoint[V * kSlice];  // slices of S0 and D
  float q_up[kChunk], k_up[kChunk], e_up[kChunk], d_o_up[kChunk], de_up[kChunk], beta[kChunk];
  float G[2][kChunk];  // in two parts: differences are as good as those of double
  union {
    float between[2][kChunk];  // what pairs of tokens give to the gates between them, for two warps at a time
    struct {
      float reads[kChunk], writes[kChunk];
    };
  };
  float carried[kChunk / 16];
  struct {
    Place q, k, beta, g;
  } results;
  int32_t left;
};

// --- Scores: 16 tokens times the chunk's 64, by a warp ---

using Scores = float[kChunk / 8][4];

// f(n, r, i, j) for the numbers [n][r] of a lane, which stand in row i and column j; rows from m on. What f loads by i
// and j is loaded anew each time: to keep it for the next takes more registers than there are.
template <class F>
FWP_DEVICE void for_each(int m, const F& f) {
  const int l = fresh(lane()), row = m + l / 4, column = 2 * (l % 4);
  FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
    FWP_UNROLL for (int r = 0; r < 4; ++r) f(n, r, row + r / 2 * 8, 8 * n + column + r % 2);
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

// Adds, for each t, the sum of x_ij over j < t <= i and the rows of this warp, whose blocks from `end` on are zeros. Of
// the 64 sums a lane has two, those of t = 2 lane and 2 lane + 1.
FWP_DEVICE void add_between(float (&sums)[2], const Scores& x, int m, int end) {
  const int g = lane() / 4, t = lane() % 4;
  float before[2] = {};
  FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
    if (n >= 2 * end) continue;
    float sum[2] = {};  // of columns 8n + 2t, 8n + 2t + 1
    FWP_UNROLL for (int r = 0; r < 2; ++r) {
      const int i = m + g + 8 * r, column = 8 * n + 2 * t;
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
    FWP_UNROLL for (int c = 0; c < 2; ++c) {
      FWP_UNROLL for (int mask = 4; mask < kWarpSize; mask *= 2) sum[c] += shuffle_xor(sum[c], mask);
      sums[c] += n == g ? sum[c] : 0.0f;
    }
  }
}

// --- Slices of states: S^T [V][32] with one scale ---

template <int V>
FWP_DEVICE void copy_slice(const SavedState& x, int column, Half* tile) {
  using Mine = Pieces<kSlice, V, kGradientThreads>;
  const Mine mine = Mine::mine();
  const Half* const from = x.numbers + mine.row * x.stride + column + mine.column;
  FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
    const bool there = mine.row + i * Mine::step < x.rows;
    copy_async<16>(mine.in(tile, i), there ? from + i * Mine::step * x.stride : x.numbers, there ? 16 : 0);
  }
}

// The largest of the scales of a state's columns: what a slice's numbers are divided by.
FWP_DEVICE float largest_scale(const SavedState& x) {
  uint32_t most = 0;
  for (int v = lane(); v < x.rows; v += kWarpSize) most = larger(most, magnitude(load_global(x.up + v)));
  return float_of(largest<kWarpSize>(most));
}

// Every thread its own pieces, after their copies. A barrier before others read.
template <int V>
FWP_DEVICE void scale_slice(const SavedState& x, float up, Half* tile) {
  using Mine = Pieces<kSlice, V, kGradientThreads>;
  const Mine mine = Mine::mine();
  FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
    const int v = mine.row + i * Mine::step;
    if (v >= x.rows || up == 0) continue;
    const float factor = load_global(x.up + v) / up;  // of powers of two
    auto* const at = reinterpret_cast<Quad*>(mine.in(tile, i));
    Quad piece = load_shared(at);
    FWP_UNROLL for (int j = 0; j < 4; ++j) piece.x[j] =
        pack_half(unpack_half(piece.x[j], 0) * factor, unpack_half(piece.x[j], 1) * factor);
    store_shared(at, piece);
  }
}

// This thread's part of <S, D>, of its own pieces of a slice of D.
template <int V>
FWP_DEVICE float dot_slice(const SavedState& S, int column, Half* D) {
  using Mine = Pieces<kSlice, V, kGradientThreads>;
  const Mine mine = Mine::mine();
  const Half* const from = S.numbers + mine.row * S.stride + column + mine.column;
  float sum = 0;
  FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
    const int v = mine.row + i * Mine::step;
    if (v >= S.rows) continue;
    const Quad a = load_shared(reinterpret_cast<const Quad*>(mine.in(D, i)));
    const Quad b = load_global(reinterpret_cast<const Quad*>(from + i * Mine::step * S.stride));
    float part = 0;
    FWP_UNROLL for (int j = 0; j < 8; ++j) part += unpack_half(a.x[j / 2], j % 2) * unpack_half(b.x[j / 2], j % 2);
    sum += part * load_global(S.up + v);
  }
  return sum;
}

// --- Gradients: 16 tokens times 32 channels, by a warp ---

using Channels = float[kSlice / 8][4];

// x = A S, rows m.. of A, S a slice.
template <int V>
FWP_DEVICE void times_state(Channels& x, const Half* A, const Half* S, int m) {
  clear(x);
  FWP_UNROLL for (int k = 0; k < V; k += 16) {
    uint32_t a[4];
    load_a<V, Sum::along>(a, A, m, k);
    multiply<kSlice, Sum::down, kSlice / 8>(x, a, S, 0, k);
  }
}

// x += a B, columns from `column` on and the blocks [begin, end) of rows of B; a: scores, rows divided by their scales.
template <int D>
FWP_DEVICE void add_rows(Channels& x, const uint32_t (&a)[kBlocks][4], const Scale (&scale)[2], const Half* B,
                         int column, int begin, int end) {
  Channels y;
  clear(y);
  FWP_UNROLL for (int b = 0; b < kBlocks; ++b) {
    if (b >= begin && b < end) multiply<D, Sum::down, kSlice / 8>(y, a[b], B, column, 16 * b);
  }
  FWP_UNROLL for (int n = 0; n < kSlice / 8; ++n) {
    FWP_UNROLL for (int r = 0; r < 4; ++r) x[n][r] += y[n][r] * scale[r / 2].up;
  }
}

// Rows g and g + 8 of x times a factor each; returned in dots is what they make, over the columns, with rows of B.
template <int D>
FWP_DEVICE void scale_and_dot(Channels& x, const float (&factor)[2], const Half* B, int m, int column,
                              float (&dots)[2]) {
  const int l = fresh(lane());
  FWP_UNROLL for (int r = 0; r < 2; ++r) {
    dots[r] = 0;
    FWP_UNROLL for (int n = 0; n < kSlice / 8; ++n) {
      const Half* const from = B + at<D>(m + l / 4 + 8 * r, column + 8 * n + 2 * (l % 4));
      const uint32_t two = load_shared(reinterpret_cast<const uint32_t*>(from));
      FWP_UNROLL for (int i = 0; i < 2; ++i) {
        x[n][2 * r + i] *= factor[r];
        dots[r] += x[n][2 * r + i] * unpack_half(two, i);
      }
    }
  }
}

FWP_DEVICE void store_channels(const HeadRows& to, int m, int column, const Channels& x) {
  FWP_UNROLL for (int n = 0; n < kSlice / 8; ++n) store_fragment(to, m, column + 8 * n, x[n]);
}

// The one number of row i, rounded once.
FWP_DEVICE void store_one(const HeadRows& to, int i, float x) {
  if (i < to.count) store_number(Rows{to.data, to.dtype, 0, 0, 0, 1}, i * to.stride, x);
}

// The sum over the lanes of a row of fragments.
FWP_DEVICE float sum_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// --- The kernel ---

// Grid: places, value tiles. Everything is linear in the sums over value columns; a tile has its part of it.
template <bool predicts, int D, int V>
FWP_KERNEL void gradients(FWP_PARAMETER Backward x) {
  const Problem& p = x.p;
  const HeadChunk c = HeadChunk::at(p, x.window, block_index_x());
  auto& shared = *static_cast<GradientShared<predicts, D, V>*>(shared_memory());
  if (c.t0 >= c.s.length || given_up(x.left + c.n * p.H + c.h, &shared.left)) return;

  const int64_t place = block_index_x(), tile = block_index_y(), first = tile * V;
  const int64_t last = first + V < p.V ? first + V : p.V;
  const auto rows = [&](const Rows& from, int64_t begin, int64_t end) {
    return HeadRows::from(from, Place::of(from, c.s, c.h, begin, end), c.t0, c.tokens());
  };
  const HeadRows q = rows(p.q, 0, p.K), k = rows(p.k, 0, p.K), d_o = rows(p.d_o, first, last);
  const HeadRows e = predicts ? x.E.rows(place, first) : rows(p.v, first, last), de = x.dE.rows(place, first);
  const SavedState state = x.S.of(place, first, V), adjoint = x.D.of(place, first, V);
  copy_rows<D, kGradientThreads>(q, shared.q);
  copy_rows<D, kGradientThreads>(k, shared.k);
  copy_rows<V, kGradientThreads>(e, shared.e);
  copy_rows<V, kGradientThreads>(d_o, shared.d_o);
  if constexpr (predicts) copy_rows<V, kGradientThreads>(de, shared.de);
  commit_copies();
  copy_slice<V>(state, 0, shared.state);
  commit_copies();
  copy_slice<V>(adjoint, 0, shared.adjoint);
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
  if (thread_index() == 0) {  // needed at the end: registers are short
    const auto place_of = [&](const Parts& parts, const Rows& sums, int64_t size) {
      return parts.place(sums, p, x.window, c.s, c.slot - c.t0 / kChunk, c.h, tile, 0, size);
    };
    store_shared(&shared.results.q, place_of(x.dq, p.dq, p.K));
    store_shared(&shared.results.k, place_of(x.dk, p.dk, p.K));
    store_shared(&shared.results.beta, place_of(x.dbeta, p.dbeta, 1));
    store_shared(&shared.results.g, place_of(x.dg, p.dg, 1));
  }
  wait_copies<2>();
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
  const auto gated = [&] { return fresh(int{p.dg.data != nullptr}) != 0; };  // or all would be compiled twice

  float dbeta[2] = {}, between[2] = {};  // of this lane's rows; see add_between
  uint32_t z_a[kBlocks][4], z_turned_a[kBlocks][4], y_a[kBlocks][4], most = 0;
  Scale z_scale[2], z_turned_scale[2], y_scale[2];
  {
    Scores a, b;
    dot_rows<V>(a, shared.d_o, shared.e, m, 0, w + 1);
    dot_rows<D>(b, shared.q, shared.k, m, 0, w + 1);
    for_each(m, [&](int n, int r, int i, int j) {
      const float up = scale * of(shared.beta, j) * of(shared.d_o_up, i) * of(shared.e_up, j);
      const float z = j <= i ? decay(j, i) * up * a[n][r] : 0.0f;
      b[n][r] *= z * of(shared.q_up, i) * of(shared.k_up, j);
      a[n][r] = z * of(shared.k_up, j);
    });
    most = larger(most, to_a(z_a, z_scale, a));
    if (gated()) add_between(between, b, m, w + 1);
    if constexpr (predicts) {
      Scores y;
      dot_rows<V>(y, shared.de, shared.e, m, 0, w + 1);
      dot_rows<D>(b, shared.k, shared.k, m, 0, w + 1);
      for_each(m, [&](int n, int r, int i, int j) {
        const float up = of(shared.beta, j) * of(shared.de_up, i) * of(shared.e_up, j);
        y[n][r] = j < i ? -decay(j, i) * up * y[n][r] : 0.0f;
        b[n][r] *= y[n][r] * of(shared.k_up, i) * of(shared.k_up, j);
        y[n][r] *= of(shared.k_up, j);
      });
      if (gated()) add_between(between, b, m, w + 1);
      dot_rows<V>(a, shared.e, shared.de, m, w, kBlocks);
      dot_rows<D>(b, shared.k, shared.k, m, w, kBlocks);
      for_each(m, [&](int n, int r, int i, int j) {
        const float up = of(shared.e_up, i) * of(shared.de_up, j);
        const float turned = j > i ? -decay(i, j) * up * a[n][r] : 0.0f;
        dbeta[r / 2] += turned * b[n][r] * of(shared.k_up, i) * of(shared.k_up, j);
        y[n][r] = j > i ? turned * of(shared.beta, i) * of(shared.k_up, j) : y[n][r];
      });
      most = larger(most, to_a(y_a, y_scale, y));
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
  if (!(most < kInfinite)) raise(x.left + c.n * p.H + c.h);

  float dg = 0;  // of token thread_index()
  for (int half = 0; half < 2 && gated(); ++half) {
    if (w / 2 == half)
      store_shared(reinterpret_cast<Two*>(shared.between[w % 2] + 2 * lane()),
                   Two{{bits_of(between[0]), bits_of(between[1])}});
    sync_block();
    FWP_UNROLL for (int i = 0; i < 2; ++i) {
      if (thread_index() < kChunk) dg += load_shared(shared.between[i] + thread_index());
    }
    sync_block();
  }

  const float state_up = largest_scale(state), adjoint_up = largest_scale(adjoint);
  const auto result = [&](const Parts& parts, const Rows& sums, const Place* at) {
    return HeadRows::from(parts.rows(sums), load_shared(at), c.t0, c.tokens());
  };
  float reads[2] = {}, writes[2] = {}, carried = 0;
  FWP_ROLLED for (int column = 0; column < state.stride; column += kSlice) {
    Channels sum, part;
    float factor[2], dots[2];
    const int row = m + fresh(g);  // and row + 8
    const auto set_factor = [&](const float* up, float all, bool written) {
      FWP_UNROLL for (int r = 0; r < 2; ++r) factor[r] =
          of(up, row + 8 * r) * all * (written ? decay(row + 8 * r, kChunk - 1) : exp2f(of(shared.G[0], row + 8 * r)));
    };
    const auto add_dots = [&](const float* up, float (&to)[2]) {
      FWP_UNROLL for (int r = 0; r < 2; ++r) to[r] += dots[r] * of(up, row + 8 * r);
    };
    const bool more = column + kSlice < state.stride;
    wait_copies<1>();
    scale_slice<V>(state, state_up, shared.state);
    sync_block();
    times_state<V>(part, shared.d_o, shared.state, m);
    set_factor(shared.d_o_up, scale * state_up, false);
    scale_and_dot<D>(part, factor, shared.q, m, column, dots);
    add_dots(shared.q_up, reads);
    add_rows<D>(part, z_a, z_scale, shared.k, column, 0, w + 1);
    if (p.dq.data != nullptr) store_channels(result(x.dq, p.dq, &shared.results.q), m, column, part);
    clear(sum);
    if constexpr (predicts) {
      times_state<V>(sum, shared.de, shared.state, m);
      set_factor(shared.de_up, -state_up, false);
      scale_and_dot<D>(sum, factor, shared.k, m, column, dots);
      add_dots(shared.k_up, reads);
    }
    sync_block();
    if (more) copy_slice<V>(state, column + kSlice, shared.state);
    commit_copies();

    wait_copies<1>();
    scale_slice<V>(adjoint, adjoint_up, shared.adjoint);
    if (gated()) carried += dot_slice<V>(state, column, shared.adjoint) * adjoint_up;
    sync_block();
    times_state<V>(part, shared.e, shared.adjoint, m);
    set_factor(shared.e_up, adjoint_up, true);
    scale_and_dot<D>(part, factor, shared.k, m, column, dots);
    add_dots(shared.k_up, writes);
    FWP_UNROLL for (int n = 0; n < kSlice / 8; ++n) {
      FWP_UNROLL for (int r = 0; r < 4; ++r) sum[n][r] += part[n][r] * of(shared.beta, row + r / 2 * 8);
    }
    add_rows<D>(sum, z_turned_a, z_turned_scale, shared.q, column, w, kBlocks);
    if constexpr (predicts) add_rows<D>(sum, y_a, y_scale, shared.k, column, 0, kBlocks);
    if (p.dk.data != nullptr) store_channels(result(x.dk, p.dk, &shared.results.k), m, column, sum);
    sync_block();
    if (more) copy_slice<V>(adjoint, column + kSlice, shared.adjoint);
    commit_copies();
  }
  wait_copies<0>();

  FWP_UNROLL for (int r = 0; r < 2; ++r) {
    const int i = m + g + 8 * r;
    reads[r] = sum_row(reads[r]);
    writes[r] = sum_row(writes[r]);
    dbeta[r] = sum_row(dbeta[r]) + writes[r];
    if (lane() % 4 != 0) continue;
    if (p.dbeta.data != nullptr) store_one(result(x.dbeta, p.dbeta, &shared.results.beta), i, dbeta[r]);
    store_shared(shared.reads + i, reads[r]);
    store_shared(shared.writes + i, writes[r] * of(shared.beta, i));
  }
  FWP_UNROLL for (int mask = 16; mask > 0; mask /= 2) carried += shuffle_xor(carried, mask);
  if (lane() == 0) store_shared(shared.carried + w, carried);
  sync_block();
  const int t = thread_index();
  if (t >= kChunk || !gated()) return;
  carried = 0;
  FWP_UNROLL for (int i = 0; i < kChunk / 16; ++i) carried += load_shared(shared.carried + i);
  dg += carried * exp2f(of(shared.G[0], kChunk - 1));
  for (int i = 0; i < kChunk; ++i) dg += load_shared((i < t ? shared.writes : shared.reads) + i);
  store_one(result(x.dg, p.dg, &shared.results.g), t, dg);
}

}  // namespace fwp::cuda::chunk
