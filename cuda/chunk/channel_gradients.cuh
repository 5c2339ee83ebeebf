// The gradients of a chunk and head with decays of channels (those of gradients.cuh with a G for every channel), in two
// kernels. The first has all products over value columns, in which no decay appears. The second goes through blocks of
// 16 tokens (channels.cuh): a channel for each lane, a block for each warp, products on tensor cores between blocks.
//
// With z_ij = scale <dO_i, E_j> and y_ij = -<dE_i, E_j>, what token i reads of channel c, and what it is read by:
//
//   dq_i = e^{G_i} scale S0 dO_i + sum_{j<=i} z_ij beta_j k_j e^{G_i-G_j}
//   r_i  = -e^{G_i} S0 dE_i + sum_{j<i} y_ij beta_j k_j e^{G_i-G_j}
//   w_i  = e^{G_C-G_i} D E_i + sum_{j>=i} z_ji q_j e^{G_j-G_i} + sum_{j>i} y_ji k_j e^{G_j-G_i}
//
//   dk_i = r_i + beta_i w_i      dbeta_i = <k_i, w_i>
//
// dg_t is what flows from before t to t or later, as q times a part of dq, k times one of r, beta k times one of w. It
// is added up flow by flow, of which each has the factor e^{g_t}: dg keeps its digits however strong the gate is.
#pragma once

#include "channels.cuh"
#include "gradients.cuh"

namespace fwp::cuda::chunk {

// --- Products over value columns ---

template <bool predicts, int V>
struct ProductShared {
  Half e[kChunk * V], d_o[kChunk * V], de[predicts ? kChunk * V : 8];
  Half state[V * kSlice], adjoint[V * kSlice];  // slices of S0 and D
  float e_up[kChunk], d_o_up[kChunk], de_up[kChunk];
};

// Fragments into dense rows of float32, rows divided by their scales until now.
template <int N>
FWP_DEVICE void store_floats(float* to, int64_t stride, int m, const float (&x)[N][4], const float* up, float factor) {
  const int g = lane() / 4, t = lane() % 4;
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    const float row_factor = load_shared(up + m + g + 8 * i) * factor;
    FWP_UNROLL for (int n = 0; n < N; ++n)
        store_global(reinterpret_cast<Two*>(to + (m + g + 8 * i) * stride + 8 * n + 2 * t),
                     Two{{bits_of(x[n][2 * i] * row_factor), bits_of(x[n][2 * i + 1] * row_factor)}});
  }
}

// Grid: places, value tiles.
template <bool predicts, int V>
FWP_KERNEL void multiply_values(FWP_PARAMETER Backward x) {
  const Problem& p = x.p;
  const HeadChunk c = HeadChunk::at(p, x.window, block_index_x());
  if (c.t0 >= c.s.length || load_global(x.left + c.n * p.H + c.h) != 0) return;
  auto& shared = *static_cast<ProductShared<predicts, V>*>(shared_memory());
  const int64_t place = block_index_x(), tile = block_index_y(), first = tile * V;
  const int64_t last = first + V < p.V ? first + V : p.V;
  const auto rows = [&](const Rows& from) {
    return HeadRows::from(from, Place::of(from, c.s, c.h, first, last), c.t0, c.tokens());
  };
  const HeadRows d_o = rows(p.d_o), e = predicts ? x.E.rows(place, first) : rows(p.v), de = x.dE.rows(place, first);
  const SavedState state = x.S.of(place, first, V), adjoint = x.D.of(place, first, V);
  copy_rows<V, kGradientThreads>(e, shared.e);
  copy_rows<V, kGradientThreads>(d_o, shared.d_o);
  if constexpr (predicts) copy_rows<V, kGradientThreads>(de, shared.de);
  commit_copies();
  copy_slice<V>(state, 0, shared.state);
  commit_copies();
  copy_slice<V>(adjoint, 0, shared.adjoint);
  commit_copies();
  wait_copies<2>();
  scale_rows<V, kGradientThreads>(e, shared.e, shared.e_up, predicts ? x.E.up(place, first) : nullptr);
  scale_rows<V, kGradientThreads>(d_o, shared.d_o, shared.d_o_up);
  if constexpr (predicts) scale_rows<V, kGradientThreads>(de, shared.de, shared.de_up, x.dE.up(place, first));
  sync_block();

  const int w = warp(), m = 16 * w, channels = state.stride;
  const auto scale = static_cast<float>(p.scale);
  const auto to = x.products.of(place, tile);
  const auto multiply_rows = [&](float* pairs, const Half* A, const float* A_up, float factor) {
    Scores a;
    dot_rows<V>(a, A, shared.e, m, 0, w + 1);
    for_each(m, [&](int n, int r, int /*i*/, int j) { a[n][r] *= load_shared(shared.e_up + j); });
    store_floats(pairs, kChunk, m, a, A_up, factor);
  };
  multiply_rows(to.z, shared.d_o, shared.d_o_up, scale);
  if constexpr (predicts) multiply_rows(to.y, shared.de, shared.de_up, -1);

  const float state_up = largest_scale(state), adjoint_up = largest_scale(adjoint);
  FWP_ROLLED for (int column = 0; column < channels; column += kSlice) {
    Channels part;
    const bool more = column + kSlice < channels;
    wait_copies<1>();
    scale_slice<V>(state, state_up, shared.state);
    sync_block();
    times_state<V>(part, shared.d_o, shared.state, m);
    store_floats(to.reads_q + column, channels, m, part, shared.d_o_up, scale * state_up);
    if constexpr (predicts) {
      times_state<V>(part, shared.de, shared.state, m);
      store_floats(to.reads_k + column, channels, m, part, shared.de_up, -state_up);
    }
    sync_block();
    if (more) copy_slice<V>(state, column + kSlice, shared.state);
    commit_copies();
    wait_copies<1>();
    scale_slice<V>(adjoint, adjoint_up, shared.adjoint);
    sync_block();
    times_state<V>(part, shared.e, shared.adjoint, m);
    store_floats(to.writes + column, channels, m, part, shared.e_up, adjoint_up);
    sync_block();
    if (more) copy_slice<V>(adjoint, column + kSlice, shared.adjoint);
    commit_copies();
  }
  wait_copies<0>();

  for (int channel = thread_index(); channel < channels; channel += kGradientThreads) {
    float sum = 0;
    FWP_UNROLL_BY(4) for (int v = 0; v < state.rows; ++v) {
      const float a = to_float(load_global(state.numbers + v * channels + channel));
      const float b = to_float(load_global(adjoint.numbers + v * channels + channel));
      sum += a * b * (load_global(state.up + v) * load_global(adjoint.up + v));
    }
    store_global(to.carried + channel, sum);
  }
}

// --- Blocks and channels ---

constexpr int kFragmentRow = kSlice + 8;  // of float32 in shared memory: stored as fragments, loaded by columns

template <bool predicts>
struct ChannelGradientShared {
  static constexpr int blocks = predicts ? kBlocks : 1;
  float z[kBlocks][kBlock * kBlock], y[blocks][kBlock * kBlock];  // inside of blocks
  // A slice's rows as operands: beta k decayed to the end of their block, q and k decayed from its begin. A channel of
  // a block has one scale, and its pairs of blocks have what else they are to be multiplied by: the blocks in between.
  Half columns[kChunk * kSlice], q[kChunk * kSlice], k[predicts ? kChunk * kSlice : 8];
  float columns_up[kPairs][kSlice], q_up[kPairs][kSlice], k_up[predicts ? kPairs : 1][kSlice];
  float a[kChunk * kSlice], q_rows[kChunk * kSlice],
      k_rows[kChunk * kSlice];                  // decays and inputs, of each lane its own
  float decay[kBlocks][kSlice];                 // of the blocks
  float from_blocks[3][kChunk * kFragmentRow];  // to q, to k, of k
  float reads[kBlocks][kSlice],
      writes[kBlocks][kSlice];  // flows from before the chunk to a block, from one to behind it
  float far[2][kSlice];         // from block 0 across the next one, and to block 3 across the one before
  float beta[kChunk];
  struct {
    Place q, k, g;
  } results;
  int32_t left;
};

FWP_DEVICE void store_channel(const HeadRows& to, int i, int channel, float x) {
  if (i < to.count && channel < to.columns)
    store_number(Rows{to.data, to.dtype, 0, 0, 0, 1}, i * to.stride + channel, x);
}

// Grid: places, value tiles. Everything is linear in the sums over value columns; a tile has its part of it.
template <bool predicts>
FWP_KERNEL void gradients_by_channel(FWP_PARAMETER Backward x) {
  const Problem& p = x.p;
  const HeadChunk c = HeadChunk::at(p, x.window, block_index_x());
  int32_t* const left = x.left + c.n * p.H + c.h;
  auto& shared = *static_cast<ChannelGradientShared<predicts>*>(shared_memory());
  if (c.t0 >= c.s.length || given_up(left, &shared.left)) return;
  const int64_t place = block_index_x(), tile = block_index_y();
  const auto from = x.products.of(place, tile);
  const int w = warp(), first = w * kBlock, g = lane() / 4, t = lane() % 4, channels = x.S.channels;

  if (thread_index() == 0) {  // registers are short
    const auto place_of = [&](const Parts& parts, const Rows& sums) {
      return parts.place(sums, p, x.window, c.s, c.slot - c.t0 / kChunk, c.h, tile, 0, p.K);
    };
    store_shared(&shared.results.q, place_of(x.dq, p.dq));
    store_shared(&shared.results.k, place_of(x.dk, p.dk));
    store_shared(&shared.results.g, place_of(x.dg, p.dg));
  }
  if (const int i = thread_index(); i < kChunk) {
    float beta = i < c.tokens() ? 1.0f : 0.0f;
    if (i < c.tokens() && p.beta.data != nullptr) beta = load_number<float>(p.beta, row_at(p.beta, c.s, c.t0 + i, c.h));
    store_shared(shared.beta + i, beta);
  }
  const auto load_diagonal = [&](float* to, const float* pairs) {
    const int row = lane() / 2, column = lane() % 2 * 8;
    FWP_UNROLL for (int i = 0; i < 8; i += 4)
        store_shared(reinterpret_cast<Quad*>(to + row * kBlock + column + i),
                     load_global(reinterpret_cast<const Quad*>(pairs + (first + row) * kChunk + first + column + i)));
  };
  load_diagonal(shared.z[w], from.z);
  if constexpr (predicts) load_diagonal(shared.y[w], from.y);

  // Scores of this block's tokens, which are rows, with those of blocks before it, which they read, and after it, which
  // they are read by.
  uint32_t z_a[kBlocks][4], y_a[kBlocks][4], most = 0;
  Scale z_read[2], z_written[2], y_read[2], y_written[2];
  const auto load_scores = [&](uint32_t (&a)[kBlocks][4], Scale(&read)[2], Scale(&written)[2], const float* pairs) {
    Scores s;
    uint32_t before[2] = {}, after[2] = {};
    FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
      FWP_UNROLL for (int r = 0; r < 4; ++r) {
        const int i = first + g + 8 * (r / 2), j = 8 * n + 2 * t + r % 2;
        s[n][r] = n / 2 == w ? 0 : load_global(pairs + (n / 2 < w ? i * kChunk + j : j * kChunk + i));
        const uint32_t size = magnitude(s[n][r]);
        before[r / 2] = larger(before[r / 2], n / 2 < w ? size : 0);
        after[r / 2] = larger(after[r / 2], n / 2 < w ? 0 : size);
      }
    }
    FWP_UNROLL for (int i = 0; i < 2; ++i) {
      most = larger(most, larger(before[i], after[i]));
      read[i] = scale_for(largest<4>(before[i]));
      written[i] = scale_for(largest<4>(after[i]));
    }
    FWP_UNROLL for (int J = 0; J < kBlocks; ++J) {
      const Scale scale[2] = {J < w ? read[0] : written[0], J < w ? read[1] : written[1]};
      to_a(a[J], s[2 * J], s[2 * J + 1], scale);
    }
  };
  load_scores(z_a, z_read, z_written, from.z);
  if constexpr (predicts) load_scores(y_a, y_read, y_written, from.y);
  sync_block();

  const auto rows = [&](const Rows& array) {
    return HeadRows::from(array, Place::of(array, c.s, c.h, 0, p.K), c.t0, c.tokens());
  };
  const auto result = [&](const Parts& parts, const Rows& sums, const Place* at) {
    return HeadRows::from(parts.rows(sums), load_shared(at), c.t0, c.tokens());
  };
  float dbeta = 0;  // of the token of this lane's number, modulo 16
  FWP_ROLLED for (int column = 0; column < channels; column += kSlice) {
    const int channel = column + lane();
    float before = 1, after = 1;  // decays of the blocks before this one, and of those after it
    {
      float a[kBlock], q[kBlock], k[kBlock];
      const HeadRows g_rows = rows(p.g), q_rows = rows(p.q), k_rows = rows(p.k);
      const auto load = [channel](const HeadRows& of, int i) {
        float one[1];
        load_channels(one, of, i, channel);
        return one[0];
      };
      float all = 1;
      FWP_UNROLL for (int i = 0; i < kBlock; ++i) {
        a[i] = exponential(load(g_rows, first + i));
        q[i] = load(q_rows, first + i);
        k[i] = load(k_rows, first + i);
        all *= a[i];
        store_shared(shared.a + (first + i) * kSlice + lane(), a[i]);
        store_shared(shared.q_rows + (first + i) * kSlice + lane(), q[i]);
        store_shared(shared.k_rows + (first + i) * kSlice + lane(), k[i]);
      }
      store_shared(shared.decay[w] + lane(), all);
      sync_block();  // the decays are there, and what there was of the slice before is no longer needed

      float y[kBlock];
      const auto store = [&](Half* operand) {  // returns what is to be multiplied by
        uint32_t largest_here = 0;
        FWP_UNROLL for (int i = 0; i < kBlock; ++i) largest_here = larger(largest_here, magnitude(y[i]));
        most = larger(most, largest_here);
        const Scale scale = scale_for(largest_here);
        FWP_UNROLL for (int i = 0; i < kBlock; ++i)
            store_shared(operand + at<kSlice>(first + i, lane()), to_half(y[i] * scale.down));
        return scale.up;
      };
      const auto decays = [&](const float (&of)[kBlock], bool to_end, bool weighed) {
        float decay = 1;
        FWP_UNROLL for (int n = 0; n < kBlock; ++n) {
          const int i = to_end ? kBlock - 1 - n : n;
          if (!to_end) decay *= a[i];
          y[i] = of[i] * decay * (weighed ? load_shared(shared.beta + first + i) : 1.0f);
          if (to_end) decay *= a[i];
        }
      };
      decays(q, false, false);
      const float q_up = store(shared.q);
      float k_up = 0;
      if constexpr (predicts) {
        decays(k, false, false);
        k_up = store(shared.k);
      }
      decays(k, true, true);
      const float columns_up = store(shared.columns);
      FWP_UNROLL for (int J = kBlocks - 1; J >= 0; --J) {
        if (J >= w) continue;
        store_shared(shared.q_up[pair_of(w, J)] + lane(), q_up * before);
        if constexpr (predicts) store_shared(shared.k_up[pair_of(w, J)] + lane(), k_up * before);
        before *= load_shared(shared.decay[J] + lane());
      }
      FWP_UNROLL for (int I = 0; I < kBlocks; ++I) {
        if (I <= w) continue;
        store_shared(shared.columns_up[pair_of(I, w)] + lane(), columns_up * after);
        after *= load_shared(shared.decay[I] + lane());
      }
    }
    sync_block();  // the operands are there

    Channels to_q, to_k, of_k;
    clear(to_q);
    clear(to_k);
    clear(of_k);
    const auto add = [&](Channels& to, const uint32_t (&scores)[4], const Scale(&scale)[2], const Half* operand, int J,
                         const float* up) {
      Channels part;
      clear(part);
      multiply<kSlice, Sum::down, kSlice / 8>(part, scores, operand, 0, kBlock * J);
      FWP_UNROLL for (int n = 0; n < kSlice / 8; ++n) {
        float column_up[2];
        load_tokens(column_up, up, n);
        FWP_UNROLL for (int r = 0; r < 4; ++r) to[n][r] += part[n][r] * scale[r / 2].up * column_up[r % 2];
      }
    };
    const auto add_blocks = [&](bool far) {
      FWP_UNROLL for (int J = 0; J < kBlocks; ++J) {
        if (J == w || (J + 1 < w || J > w + 1) != far) continue;
        if (J < w) {
          add(to_q, z_a[J], z_read, shared.columns, J, shared.columns_up[pair_of(w, J)]);
          if constexpr (predicts) add(to_k, y_a[J], y_read, shared.columns, J, shared.columns_up[pair_of(w, J)]);
        } else {
          add(of_k, z_a[J], z_written, shared.q, J, shared.q_up[pair_of(J, w)]);
          if constexpr (predicts) add(of_k, y_a[J], y_written, shared.k, J, shared.k_up[pair_of(J, w)]);
        }
      }
    };
    const auto share = [&] {
      const auto store = [&](const Channels& part, float* to) {
        FWP_UNROLL for (int n = 0; n < kSlice / 8; ++n) {
          FWP_UNROLL for (int i = 0; i < 2; ++i)
              store_shared(reinterpret_cast<Two*>(to + (first + g + 8 * i) * kFragmentRow + 8 * n + 2 * t),
                           Two{{bits_of(part[n][2 * i]), bits_of(part[n][2 * i + 1])}});
        }
      };
      store(to_q, shared.from_blocks[0]);
      if constexpr (predicts) store(to_k, shared.from_blocks[1]);
      store(of_k, shared.from_blocks[2]);
      sync_warp();
    };
    const auto at_from_blocks = [&](int which, int i) {
      return shared.from_blocks[which] + (first + i) * kFragmentRow + lane();
    };
    const auto from_blocks = [&](int which, int i) { return load_shared(at_from_blocks(which, i)); };
    const auto of = [&](const float* slice, int i) { return load_shared(slice + (first + i) * kSlice + lane()); };
    add_blocks(true);
    if (w == 0 || w == kBlocks - 1) {
      share();
      float sum = 0, decay = 1;
      if (w == 0) {
        FWP_UNROLL for (int i = kBlock - 1; i >= 0; --i) {
          sum += decay * (load_shared(shared.beta + first + i) * of(shared.k_rows, i)) * from_blocks(2, i);
          decay *= of(shared.a, i);
        }
      } else {
        FWP_UNROLL for (int i = 0; i < kBlock; ++i) {
          decay *= of(shared.a, i);
          sum += decay * of(shared.q_rows, i) * from_blocks(0, i);
          if constexpr (predicts) sum += decay * of(shared.k_rows, i) * from_blocks(1, i);
        }
      }
      store_shared(shared.far[w == 0 ? 0 : 1] + lane(), sum);
      sync_warp();
    }
    add_blocks(false);
    share();

    // The block token by token. f_j: the decay from j to token i, fk_j = beta_j k_j f_j. What a token reads waits for
    // what it is read by in shared memory: registers are short.
    float f[kBlock], fk[kBlock], w_j[kBlock], dg[kBlock] = {}, decay = 1, reads = 0, writes = 0;
    const HeadRows dq = result(x.dq, p.dq, &shared.results.q);
    FWP_UNROLL for (int i = 0; i < kBlock; ++i) {
      float z[kBlock], y[kBlock] = {};
      FWP_UNROLL for (int j = 0; j <= i; j += 4) {
        const Quad four = load_shared(reinterpret_cast<const Quad*>(shared.z[w] + i * kBlock + j));
        FWP_UNROLL for (int l = 0; l < 4; ++l) z[j + l] = float_of(four.x[l]);
        if constexpr (predicts) {
          const Quad other = load_shared(reinterpret_cast<const Quad*>(shared.y[w] + i * kBlock + j));
          FWP_UNROLL for (int l = 0; l < 4; ++l) y[j + l] = float_of(other.x[l]);
        }
      }
      const float a = of(shared.a, i), q = of(shared.q_rows, i), k = of(shared.k_rows, i);
      decay *= a;
      const int64_t at = (first + i) * channels + channel;
      float of_state = before * load_global(from.reads_q + at);
      float dq_i = decay * (of_state + from_blocks(0, i)), dk_i = 0, flow = q * dq_i;
      reads += decay * q * of_state;
      if constexpr (predicts) {
        of_state = before * load_global(from.reads_k + at);
        dk_i = decay * (of_state + from_blocks(1, i));
        flow += k * dk_i;
        reads += decay * k * of_state;
      }
      dg[0] += flow;
      FWP_UNROLL for (int j = 0; j < i; ++j) {
        f[j] *= a;
        fk[j] *= a;
        const float to_j = predicts ? z[j] * q + y[j] * k : z[j] * q;
        dq_i += z[j] * fk[j];
        if constexpr (predicts) dk_i += y[j] * fk[j];
        w_j[j] += f[j] * to_j;
        flow += fk[j] * to_j;
        dg[j + 1] += flow;
      }
      f[i] = 1;
      fk[i] = k * load_shared(shared.beta + first + i);
      dq_i += z[i] * fk[i];
      w_j[i] = z[i] * q;
      if constexpr (predicts) store_shared(at_from_blocks(1, i), dk_i);
      if (p.dq.data != nullptr) store_channel(dq, first + i, channel, dq_i);
    }
    float dbeta_j[kBlock], written = 0;
    const HeadRows dk_rows = result(x.dk, p.dk, &shared.results.k);
    FWP_UNROLL for (int j = 0; j < kBlock; ++j) {
      const float of_state = after * load_global(from.writes + (first + j) * channels + channel);
      const float later = of_state + from_blocks(2, j), w_all = w_j[j] + f[j] * later;
      dbeta_j[j] = of(shared.k_rows, j) * w_all;
      if (p.dk.data != nullptr)
        store_channel(dk_rows, first + j, channel,
                      (predicts ? from_blocks(1, j) : 0.0f) + load_shared(shared.beta + first + j) * w_all);
      dg[j] += written;
      written += fk[j] * later;
      writes += fk[j] * of_state;
    }
    dbeta += sum_over_lanes(dbeta_j);
    store_shared(shared.reads[w] + lane(), reads);
    store_shared(shared.writes[w] + lane(), writes);
    float carried = before * decay * after * load_global(from.carried + channel);
    sync_block();
    FWP_UNROLL for (int b = 0; b < kBlocks; ++b) {
      if (b > w) carried += load_shared(shared.reads[b] + lane());
      if (b < w) carried += load_shared(shared.writes[b] + lane());
    }
    if (w == 1 || w == 2) carried += load_shared(shared.far[w - 1] + lane());
    if (p.dg.data != nullptr) {
      const HeadRows to = result(x.dg, p.dg, &shared.results.g);
      FWP_UNROLL for (int i = 0; i < kBlock; ++i) store_channel(to, first + i, channel, dg[i] + carried);
    }
  }
  if (p.dbeta.data != nullptr && lane() < kBlock) {
    const Place at = x.dbeta.place(p.dbeta, p, x.window, c.s, c.slot - c.t0 / kChunk, c.h, tile, 0, 1);
    store_one(HeadRows::from(x.dbeta.rows(p.dbeta), at, c.t0, c.tokens()), first + lane(), dbeta);
  }
  if (!(most < kInfinite)) raise(left);
}

}  // namespace fwp::cuda::chunk
