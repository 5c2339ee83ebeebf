// The adjoint of the state, right to left through a head's chunks; fragments and blocks are those of scan.cuh. Of a
// chunk, with the adjoint D of its last state and P, T' and G as there:
//
//   dU = P^T dO + e^(G_C - G) (K D)      dE = T'^T diag(beta) dU      dV = dE
//   D0 = e^G_C D + scale (e^G Q)^T dO - (e^G K)^T dE
//
// Rules that do not predict: dV = diag(beta) dU, and no dE in D0. Decays of channels: the rows of prep.cuh, as there.
#pragma once

#include "backward.cuh"

namespace fwp::cuda::chunk {

// x = a L for columns 32 half.. of L [64][64], lower triangular.
FWP_DEVICE void multiply_lower(float (&x)[4][4], const uint32_t (&a)[4][4], const Half* L, int half) {
  clear(x);
  FWP_UNROLL for (int k = 0; k < 4; ++k) {
    if (k == 2 * half) multiply<kChunk, Sum::down, 2>(x, a[k], L, 32 * half, 16 * k);
    if (k > 2 * half) multiply<kChunk, Sum::down, 4>(x, a[k], L, 32 * half, 16 * k);
  }
}

// dU^T, from what the state after the chunk and later tokens of it make of a write. Returns the largest magnitude of
// operands.
template <int D, Decay decays, class Stage>
FWP_DEVICE uint32_t written_adjoints(float (&dU)[8][4], const Stage& stage, float factor, const Half* P,
                                     const float* P_up, DType dtype, const Half* d_o_tile,
                                     const uint32_t (&S)[D / 16][4], const Scale (&S_scale)[2]) {
  constexpr bool by_channel = decays == Decay::channel;
  clear(dU);
  FWP_UNROLL for (int k = 0; k < D / 16; ++k)
      multiply<D, Sum::along, 8>(dU, S[k], by_channel ? stage.writes : stage.k, 0, 16 * k);
  uint32_t d_o[4][4];
  Scale scale[2];
  float x[8][4];
  load_turned(x, dtype, d_o_tile);
  FWP_UNROLL for (int i = 0; i < 8; ++i) {
    float q_up[2] = {1, 1}, up[2];
    if constexpr (!by_channel) load_tokens(q_up, stage.q_up, i);
    load_tokens(up, P_up, i);
    FWP_UNROLL for (int r = 0; r < 4; ++r) x[i][r] *= q_up[r % 2] * up[r % 2] * factor;
  }
  const uint32_t most = tokens_to_a(d_o, scale, x);
  FWP_UNROLL for (int half = 0; half < 2; ++half) {
    float inside[4][4];
    multiply_lower(inside, d_o, P, half);
    FWP_UNROLL for (int i = 4 * half; i < 4 * half + 4; ++i) {
      float k_up[2] = {1, 1}, decay[2] = {1, 1};
      if constexpr (!by_channel) load_tokens(k_up, stage.k_up, i);
      if constexpr (decays != Decay::none) load_tokens(decay, by_channel ? stage.writes_up : stage.decay_left, i);
      FWP_UNROLL for (int r = 0; r < 4; ++r) dU[i][r] =
          (dU[i][r] * S_scale[r / 2].up * decay[r % 2] + inside[i % 4][r] * scale[r / 2].up) * k_up[r % 2];
    }
  }
  return most;
}

// x = T'^T x for columns of tokens. Returns the largest magnitude seen.
template <class Stage>
FWP_DEVICE uint32_t solve_adjoint(float (&x)[8][4], const Stage& stage, const Half* T) {
  uint32_t a[4][4];
  Scale scale[2];
  FWP_UNROLL for (int i = 0; i < 8; ++i) {
    float T_up[2];
    load_tokens(T_up, stage.T_up, i);
    FWP_UNROLL for (int r = 0; r < 4; ++r) x[i][r] *= T_up[r % 2];
  }
  const uint32_t most = tokens_to_a(a, scale, x);
  FWP_UNROLL for (int half = 0; half < 2; ++half) {
    float y[4][4];
    multiply_lower(y, a, T, half);
    FWP_UNROLL for (int i = 0; i < 4; ++i) {
      FWP_UNROLL for (int r = 0; r < 4; ++r) x[4 * half + i][r] = y[i][r] * scale[r / 2].up;
    }
  }
  return most;
}

// D += (X^T x)^T, the rows of the tile X and their tokens x times a factor each. Returns the largest magnitude seen.
template <int channels, Decay decays, class Load>
FWP_DEVICE uint32_t add_reads(float (&D)[channels / 8][4], const Load& load_decay, float (&x)[8][4], float factor,
                              const float* decay, const Half* X, const float* X_up) {
  uint32_t a[4][4];
  Scale scale[2];
  FWP_UNROLL for (int i = 0; i < 8; ++i) {
    float up[2], to_token[2] = {1, 1};
    load_tokens(up, X_up, i);
    if constexpr (decays == Decay::scalar) load_tokens(to_token, decay, i);
    FWP_UNROLL for (int r = 0; r < 4; ++r) x[i][r] *= up[r % 2] * to_token[r % 2] * factor;
  }
  const uint32_t most = to_a(a, scale, x);
  write<channels>(D, X, load_decay, a, scale);
  return most;
}

// Grid: value tiles * H * N, the tiles of a head side by side.
template <int channels, bool predicts, Decay decays>
FWP_KERNEL void reverse_scan(FWP_PARAMETER Backward x) {
  constexpr bool by_channel = decays == Decay::channel;
  const Problem& p = x.p;
  const auto heads = static_cast<unsigned>(p.H), tiles = static_cast<unsigned>((p.V + kValueTile - 1) / kValueTile);
  const unsigned tile = block_index_x() % tiles, h = block_index_x() / tiles % heads,
                 n = block_index_x() / tiles / heads;
  const Sequence s = sequence(p, n);
  const Span span = Span::of(p, x.window, n, s);
  auto& shared = *static_cast<ScanShared<channels, decays>*>(shared_memory());
  if (!span.here || given_up(x.left + n * p.H + h, &shared.left)) return;
  const int column = static_cast<int>(tile) * kValueTile + warp() * kColumns, V = static_cast<int>(p.V);
  const int end_column = column + kColumns < V ? column + kColumns : V;
  Half* const d_o_tile = shared.v[warp()];

  // What the loop does not change but needs now and then waits in shared memory: registers are short.
  auto* const places = &shared.places[warp()];
  if (lane() == 0) {
    store_shared(&places->k, Place::of(p.k, s, h, 0, p.K));
    store_shared(&places->q, Place::of(p.q, s, h, 0, p.K));
    store_shared(&places->v, Place::of(p.d_o, s, h, column, end_column));
    store_shared(&places->o, x.dv.place(p.dv, p, x.window, s, span.slot, h, 0, column, end_column));
  }
  sync_warp();
  const int first_place = fresh(span.place(p, x.window, h));
  const int64_t beta = fresh(row_at(p.beta, s, 0, h));
  const auto rows = [&](const Rows& array, const Place* place, int c) {
    return HeadRows::from(array, load_shared(place), int64_t{c} * kChunk, tokens_of_chunk(s, c));
  };
  const auto copy_keys = [&](int c) {
    auto& stage = shared.stage(c);
    if constexpr (by_channel) {
      const int64_t place = first_place + int64_t{c} * heads;
      copy_prepared<channels>(x.prepared.writes, place, stage.writes);
      copy_prepared<kChunk>(x.prepared.P, place, shared.P);
    } else {
      copy_rows<channels, kScanThreads>(rows(p.k, &places->k, c), stage.k);
      copy_rows<channels, kScanThreads>(rows(p.q, &places->q, c), stage.q);
    }
    commit_copies();
  };
  const auto copy_adjoints = [&](int c) {
    copy_rows<kColumns, kWarpSize>(rows(p.d_o, &places->v, c), d_o_tile);
    commit_copies();
  };
  // What a chunk needs when it has the adjoints of what it wrote.
  const auto copy_T = [&](int c) {
    const int64_t place = first_place + int64_t{c} * heads;
    if constexpr (predicts) copy_prepared<kChunk>(x.prepared.T, place, shared.T);
    if constexpr (by_channel) {
      if constexpr (predicts) copy_prepared<channels>(x.prepared.reads_k, place, shared.stage(c).k);
      copy_prepared<channels>(x.prepared.reads_q, place, shared.stage(c).q);
      copy_decays<channels>(x.prepared, place, shared.stage(c));
    }
    commit_copies();
  };

  float D[channels / 8][4];
  const bool first = span.begin == 0, last = span.end == span.chunks;
  load_state<channels>(D, p, last ? p.d_hT : x.after, last ? n : span.axis, h, column);
  uint32_t most = 0;  // the largest magnitude of all operands
  if (span.begin < span.end) {
    copy_keys(span.end - 1);
    copy_adjoints(span.end - 1);
    copy_T(span.end - 1);
  }
  for (int c = span.end - 1; c >= span.begin; --c) {
    const bool more = c > span.begin;
    const int64_t place = first_place + int64_t{c} * heads;
    auto& stage = shared.stage(c);
    const Token token = load_token<predicts, decays>(p.beta, beta + int64_t{c} * kChunk * p.beta.t,
                                                     tokens_of_chunk(s, c), x.prepared, place);
    wait_copies<by_channel ? 1 : 0>();
    if constexpr (!by_channel) {
      most = larger(most, scale_rows<channels, kScanThreads>(rows(p.k, &places->k, c), stage.k, stage.k_up));
      most = larger(most, scale_rows<channels, kScanThreads>(rows(p.q, &places->q, c), stage.q, stage.q_up));
    }
    store_token<decays>(stage, shared.P_up, token);
    sync_block();  // the chunk is there, and the one after it is no longer needed
    if constexpr (!by_channel) {
      if (more) copy_keys(c - 1);
      most = larger(most, multiply_queries<channels, decays>(stage, shared.P, shared.P_up));
      sync_block();  // P is there
    }

    uint32_t D_a[channels / 16][4];
    Scale D_scale[2];
    most = larger(most, to_a(D_a, D_scale, D));
    if (column < x.D.columns) x.D.of(place, column, kColumns).template store<channels>(D_a, D_scale);
    float y[8][4];
    most = larger(most, written_adjoints<channels, decays>(y, stage, static_cast<float>(p.scale), shared.P, shared.P_up,
                                                           p.d_o.dtype, d_o_tile, D_a, D_scale));
    if constexpr (by_channel) {
      wait_copies<0>();
      sync_block();  // the rest is there, and P and what is written are no longer needed
      if (more) copy_keys(c - 1);
    }
    FWP_UNROLL for (int i = 0; i < 8; ++i) {
      float strength[2];
      load_tokens(strength, stage.beta, i);
      FWP_UNROLL for (int r = 0; r < 4; ++r) y[i][r] *= strength[r % 2];
    }
    if constexpr (predicts) most = larger(most, solve_adjoint(y, stage, shared.T));
    if (p.dv.data != nullptr) {
      const HeadRows dv = rows(x.dv.rows(p.dv), &places->o, c);
      FWP_UNROLL for (int i = 0; i < 8; ++i) {
        float copy[4] = {y[i][0], y[i][1], y[i][2], y[i][3]};
        dv.dtype == DType::f32 ? store_turned(dv, 8 * i, copy) : store_turned_halves(dv, 8 * i, copy);
      }
    }
    if constexpr (predicts) {
      if (column < x.dE.columns) x.dE.store(place, column, y);
    }

    const auto decay_chunk = decay_of<decays>(stage);
    if constexpr (predicts)
      most = larger(most, add_reads<channels, decays>(D, decay_chunk, y, -1, stage.decay, stage.k, stage.k_up));
    load_turned(y, p.d_o.dtype, d_o_tile);
    sync_warp();
    if (more) copy_adjoints(c - 1);
    const auto add_queries = [&](const auto& load_decay) {
      return add_reads<channels, decays>(D, load_decay, y, static_cast<float>(p.scale), stage.decay, stage.q,
                                         stage.q_up);
    };
    if constexpr (predicts)
      most = larger(most, add_queries(decay_of<Decay::none>(stage)));
    else
      most = larger(most, add_queries(decay_chunk));
    sync_block();  // P and T' are no longer needed
    if (more) copy_T(c - 1);
  }
  Scale ignored[2];
  most = larger(most, row_scales(ignored, D));
  if (most >= kInfinite) raise(x.left + n * p.H + h);
  store_state<channels>(D, p, first ? p.dh0 : x.before, first ? n : span.axis, h, column);
}

}  // namespace fwp::cuda::chunk
