// The chunk form through time: a block goes through a head's chunks with 16 value columns for each of its warps, their
// states in registers. Of a chunk, with its first state S0, G from prep.cuh and Gam_ij = e^(G_i - G_j) for j <= i:
//
//   R = V - e^G (K S0)      E = T' R      U = diag(beta) E        (E = V for rules that do not predict)
//   O = scale (e^G (Q S0) + P U)          P = Q K^T * Gam, on and below the diagonal, selected
//   S1 = e^G_C S0 + (e^(G_C - G) K)^T U
//
// A warp computes it transposed (tile.cuh): value columns never meet, so each has scales of its own for S, R and U, and
// which columns share a block or a warp changes no bit. Only P is shared by the warps of a block, and K, Q, T'.
//
// A decay of channels stands in rows that prep.cuh has left, e^G K where the rule predicts, e^(G_C - G) K where it
// writes, e^G Q where it reads, and P: they take the places of K and Q, and e^G_C multiplies rows of S. There are more
// of them, so each has one tile, which is filled again as soon as the block is done with it.
#pragma once

#include "saved.cuh"

namespace fwp::cuda::chunk {

constexpr int kWarps = 4, kScanThreads = kWarps * kWarpSize, kValueTile = kWarps * kColumns;

// A window of time. The state of a sequence that goes on outside of it is that of its axis, [axis][H][K][V].
struct Scan {
  Problem p;
  Window window;
  Prepared prepared;
  int32_t* left;             // [N][H]
  States before{}, after{};  // carried from and to other windows
  // For the backward, in place of outputs: the states before each chunk and, where the rule predicts, the errors.
  SavedStates S{};
  SavedRows E{};
};

template <int D, Decay decays>
struct ScanShared {
  static constexpr bool by_channel = decays == Decay::channel;
  struct alignas(128) Stage {  // a chunk while the one before it is worked on
    Half k[kChunk * D], q[kChunk * D], writes[by_channel ? kChunk * D : 8];
    float k_up[kChunk], q_up[kChunk], writes_up[by_channel ? kChunk : 4];
    float beta[kChunk], T_up[kChunk];
    float decay[kChunk], decay_left[kChunk];  // e^G and e^(G_C - G)
    float G_high[kChunk], G_low[kChunk];      // G in two parts: differences are as good as those of double
    float decay_chunk[by_channel ? D : 4];
  } stages[by_channel ? 1 : 2];
  Half T[kChunk * kChunk], P[kChunk * kChunk];
  Half v[kWarps][kChunk * kColumns];
  float P_up[kChunk];
  struct {
    Place k, q, v, o;
  } places[kWarps];
  int32_t left;

  FWP_DEVICE Stage& stage(int c) { return stages[by_channel ? 0 : c % 2]; }
};

// What a token has in numbers of its own; each of 64 threads has one token.
struct Token {
  float beta = 0, T_up = 1;
  double G = 0, G_end = 0;
  float k_up = 0, q_up = 0, writes_up = 0, P_up = 0;
};

template <bool predicts, Decay decays>
FWP_DEVICE Token load_token(const Rows& beta, int64_t first, int tokens, const Prepared& prepared, int64_t place) {
  const int i = thread_index();
  place *= kChunk;
  Token token;
  if (i >= kChunk) return token;
  if (i < tokens) token.beta = beta.data != nullptr ? load_number<float>(beta, first + i * beta.t) : 1.0f;
  if constexpr (predicts) token.T_up = load_global(prepared.T.up + place + i);
  if constexpr (decays == Decay::scalar) {
    token.G = load_global(prepared.G + place + i);
    token.G_end = load_global(prepared.G + place + kChunk - 1);
  }
  if constexpr (decays == Decay::channel) {
    if constexpr (predicts) token.k_up = load_global(prepared.reads_k.up + place + i);
    token.q_up = load_global(prepared.reads_q.up + place + i);
    token.writes_up = load_global(prepared.writes.up + place + i);
    token.P_up = load_global(prepared.P.up + place + i);
  }
  return token;
}

template <Decay decays, class Stage>
FWP_DEVICE void store_token(Stage& stage, float* P_up, const Token& token) {
  const int i = thread_index();
  if (i >= kChunk) return;
  store_shared(stage.beta + i, token.beta);
  store_shared(stage.T_up + i, token.T_up);
  if constexpr (decays == Decay::scalar) {
    const float high = static_cast<float>(token.G);
    store_shared(stage.G_high + i, high);
    store_shared(stage.G_low + i, static_cast<float>(token.G - static_cast<double>(high)));
    store_shared(stage.decay + i, exp2f(high));
    store_shared(stage.decay_left + i, exp2f(static_cast<float>(token.G_end - token.G)));
    if (i == 0) store_shared(stage.decay_chunk, exp2f(static_cast<float>(token.G_end)));
  }
  if constexpr (decays == Decay::channel) {
    store_shared(stage.k_up + i, token.k_up);
    store_shared(stage.q_up + i, token.q_up);
    store_shared(stage.writes_up + i, token.writes_up);
    store_shared(P_up + i, token.P_up);
  }
}

// Sixteen rows of P for each warp. Returns the largest magnitude seen.
template <int D, Decay decays, class Stage>
FWP_DEVICE uint32_t multiply_queries(const Stage& stage, Half* P, float* P_up) {
  const int row = 16 * warp(), g = lane() / 4, t = lane() % 4;
  float p[8][4] = {};
  FWP_UNROLL for (int depth = 0; depth < D; depth += 16) {
    uint32_t a[4];
    load_a<D, Sum::along>(a, stage.q, row, depth);
    FWP_UNROLL for (int block = 0; block < 4; ++block) {
      if (block <= warp()) multiply<D, Sum::along, 2>(p + 2 * block, a, stage.k, 16 * block, depth);
    }
  }
  FWP_UNROLL for (int n = 0; n < 8; ++n) {
    if (n / 2 > warp()) continue;
    FWP_UNROLL for (int r = 0; r < 4; ++r) {
      const int i = row + g + 8 * (r / 2), j = 8 * n + 2 * t + r % 2;
      if constexpr (decays == Decay::scalar) {
        const float high = load_shared(stage.G_high + i) - load_shared(stage.G_high + j);
        const float low = load_shared(stage.G_low + i) - load_shared(stage.G_low + j);
        p[n][r] *= exp2f(j < i ? high + low : 0.0f);
      }
      p[n][r] = j <= i ? p[n][r] : 0.0f;
    }
  }
  Scale scale[2];
  const uint32_t most = row_scales(scale, p);
  FWP_UNROLL for (int n = 0; n < 8; ++n) {
    if (n / 2 <= warp()) store_rows<kChunk>(P, row, 8 * n, p[n], scale);
  }
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    if (t == 0) store_shared(P_up + row + g + 8 * i, scale[i].up);
  }
  return most;
}

// Begins to copy a chunk's prepared rows into a tile, and its decays.
template <int D>
FWP_DEVICE void copy_prepared(const PreparedRows& rows, int64_t place, Half* tile) {
  copy_tile<D, kChunk, kScanThreads>(rows.numbers + place * kChunk * D, tile);
}
template <int D, class Stage>
FWP_DEVICE void copy_decays(const Prepared& prepared, int64_t place, Stage& stage) {
  const int i = thread_index() * 4;
  if (i < D) copy_async<16>(stage.decay_chunk + i, prepared.decay + place * D + i);
}

// The state of a warp's columns: S^T [16][D] as fragments.
template <int D>
FWP_DEVICE void load_state(float (&S)[D / 8][4], const Problem& p, const States& from, int64_t n, int64_t h,
                           int64_t column) {
  const int l = fresh(lane());
  FWP_UNROLL for (int n8 = 0; n8 < D / 8; ++n8) {
    FWP_UNROLL for (int r = 0; r < 4; ++r) {
      const int64_t d = 8 * n8 + 2 * (l % 4) + r % 2, j = column + l / 4 + 8 * (r / 2);
      S[n8][r] = 0;
      if (from.data != nullptr && d < p.K && j < p.V)
        S[n8][r] = load_global(static_cast<const float*>(from.data) + state_at(from, n, h) + d * from.k + j);
    }
  }
}
template <int D>
FWP_DEVICE void store_state(const float (&S)[D / 8][4], const Problem& p, const States& to, int64_t n, int64_t h,
                            int64_t column) {
  const int l = fresh(lane());
  FWP_UNROLL for (int n8 = 0; n8 < D / 8; ++n8) {
    FWP_UNROLL for (int r = 0; r < 4; ++r) {
      const int64_t d = 8 * n8 + 2 * (l % 4) + r % 2, j = column + l / 4 + 8 * (r / 2);
      if (to.data != nullptr && d < p.K && j < p.V)
        store_global(static_cast<float*>(to.data) + state_at(to, n, h) + d * to.k + j, S[n8][r]);
    }
  }
}

// The two tokens of a lane in fragment i of a chunk.
FWP_DEVICE void load_tokens(float (&x)[2], const float* numbers, int i) {
  load_two(x, numbers + 8 * i + 2 * (lane() % 4));
}

// What a warp does with a chunk, its columns transposed: tokens, or channels of S, are columns of the fragments.

// e = R, from a chunk's values and S.
template <int D, bool predicts, Decay decays, class Stage>
FWP_DEVICE void predict(float (&e)[8][4], const Stage& stage, DType dtype, const Half* v_tile,
                        const uint32_t (&S)[D / 16][4], const Scale (&S_scale)[2]) {
  clear(e);
  if constexpr (predicts) {
    FWP_UNROLL for (int k = 0; k < D / 16; ++k) multiply<D, Sum::along, 8>(e, S[k], stage.k, 0, 16 * k);
  }
  FWP_UNROLL for (int m = 0; m < 8; m += 2) {
    float v[2][4];
    load_turned(v, dtype, v_tile, 8 * m);
    FWP_UNROLL for (int i = m; i < m + 2; ++i) {
      float k_up[2] = {}, decay[2] = {1, 1};
      if constexpr (predicts) load_tokens(k_up, stage.k_up, i);
      if constexpr (predicts && decays == Decay::scalar) load_tokens(decay, stage.decay, i);
      FWP_UNROLL for (int r = 0; r < 4; ++r) e[i][r] =
          predicts ? v[i - m][r] - e[i][r] * (k_up[r % 2] * decay[r % 2]) * S_scale[r / 2].up : v[i - m][r];
    }
  }
}

// e: from R to E = T' R. T' is lower triangular. Returns the largest magnitude of R.
template <class Stage>
FWP_DEVICE uint32_t solve(float (&e)[8][4], const Stage& stage, const Half* T) {
  uint32_t R[4][4];
  Scale scale[2];
  const uint32_t most = tokens_to_a(R, scale, e);
  clear(e);
  multiply<kChunk, Sum::along, 8>(e, R[0], T, 0, 0);
  multiply<kChunk, Sum::along, 6>(e + 2, R[1], T, 16, 16);
  multiply<kChunk, Sum::along, 4>(e + 4, R[2], T, 32, 32);
  multiply<kChunk, Sum::along, 2>(e + 6, R[3], T, 48, 48);
  FWP_UNROLL for (int i = 0; i < 8; ++i) {
    float T_up[2];
    load_tokens(T_up, stage.T_up, i);
    FWP_UNROLL for (int r = 0; r < 4; ++r) e[i][r] *= T_up[r % 2] * scale[r / 2].up;
  }
  return most;
}

// O, sixteen tokens at a time, into rows of the output. U: with the scales of the keys, where P is without.
template <int D, Decay decays, class Stage>
FWP_DEVICE void read(const HeadRows& o, const Stage& stage, float factor, const Half* P, const float* P_up,
                     const uint32_t (&S)[D / 16][4], const Scale (&S_scale)[2], const uint32_t (&U)[4][4],
                     const Scale (&U_scale)[2]) {
  FWP_UNROLL for (int block = 0; block < 4; ++block) {
    float before[2][4], inside[2][4];
    clear(before);
    clear(inside);
    FWP_UNROLL for (int k = 0; k < D / 16; ++k) multiply<D, Sum::along, 2>(before, S[k], stage.q, 16 * block, 16 * k);
    FWP_UNROLL for (int k = 0; k <= block; ++k) multiply<kChunk, Sum::along, 2>(inside, U[k], P, 16 * block, 16 * k);
    FWP_UNROLL for (int i = 0; i < 2; ++i) {
      float q_up[2], up[2], decay[2] = {1, 1}, y[4];
      load_tokens(q_up, stage.q_up, 2 * block + i);
      load_tokens(up, P_up, 2 * block + i);
      if constexpr (decays == Decay::scalar) load_tokens(decay, stage.decay, 2 * block + i);
      FWP_UNROLL for (int r = 0; r < 4; ++r) {
        const float from_chunk = inside[i][r] * up[r % 2] * U_scale[r / 2].up;
        if constexpr (decays == Decay::channel)
          y[r] = (before[i][r] * q_up[r % 2] * S_scale[r / 2].up + from_chunk) * factor;
        else
          y[r] = (before[i][r] * decay[r % 2] * S_scale[r / 2].up + from_chunk) * (q_up[r % 2] * factor);
      }
      store_turned_halves(o, 16 * block + 8 * i, y);
    }
  }
}

// S = decay S + K^T W; load_decay: of the two channels of this lane in a fragment.
template <int D, class Load>
FWP_DEVICE void write(float (&S)[D / 8][4], const Half* K, const Load& load_decay, const uint32_t (&W)[4][4],
                      const Scale (&scale)[2]) {
  FWP_UNROLL for (int n = 0; n < D / 8; n += 4) {
    float sum[4][4];
    clear(sum);
    FWP_UNROLL for (int k = 0; k < 4; ++k) multiply<D, Sum::down, 4>(sum, W[k], K, 8 * n, 16 * k);
    FWP_UNROLL for (int i = 0; i < 4; ++i) {
      float decay[2];
      load_decay(decay, n + i);
      FWP_UNROLL for (int r = 0; r < 4; ++r) S[n + i][r] = decay[r % 2] * S[n + i][r] + sum[i][r] * scale[r / 2].up;
    }
  }
}
// What `write` loads a chunk's decay with.
template <Decay decays, class Stage>
FWP_DEVICE auto decay_of(const Stage& stage) {
  if constexpr (decays == Decay::channel) {
    return [&stage](float (&x)[2], int n) { load_tokens(x, stage.decay_chunk, n); };
  } else {
    const float decay = decays == Decay::scalar ? load_shared(stage.decay_chunk) : 1.0f;
    return [decay](float (&x)[2], int) { x[0] = x[1] = decay; };
  }
}

// Grid: value tiles * H * N, the tiles of a head side by side. output: o is written, else what the backward needs.
template <int D, bool predicts, Decay decays, bool output>
FWP_KERNEL void scan(FWP_PARAMETER Scan x) {
  constexpr bool by_channel = decays == Decay::channel;
  const Problem& p = x.p;
  const auto heads = static_cast<unsigned>(p.H), tiles = static_cast<unsigned>((p.V + kValueTile - 1) / kValueTile);
  const unsigned tile = block_index_x() % tiles, h = block_index_x() / tiles % heads,
                 n = block_index_x() / tiles / heads;
  auto& shared = *static_cast<ScanShared<D, decays>*>(shared_memory());
  if (given_up(x.left + n * p.H + h, &shared.left)) return;
  const Sequence s = sequence(p, n);
  const Span span = Span::of(p, x.window, n, s);
  if (!span.here) return;
  const int first_place = fresh(span.place(p, x.window, h));
  const int64_t beta = fresh(row_at(p.beta, s, 0, h));
  const int64_t column = int64_t{tile} * kValueTile + warp() * kColumns;
  const int64_t end_column = column + kColumns < p.V ? column + kColumns : p.V;
  Half* const v_tile = shared.v[warp()];

  // What the loop does not change but needs now and then waits in shared memory: registers are short.
  auto* const places = &shared.places[warp()];
  if (lane() == 0) {
    store_shared(&places->k, Place::of(p.k, s, h, 0, p.K));
    store_shared(&places->q, Place::of(p.q, s, h, 0, p.K));
    store_shared(&places->v, Place::of(p.v, s, h, column, end_column));
    store_shared(&places->o, Place::of(p.o, s, h, column, end_column));
  }
  sync_warp();
  const auto rows = [&](const Rows& array, const Place* place, int c) {
    return HeadRows::from(array, load_shared(place), int64_t{c} * kChunk, tokens_of_chunk(s, c));
  };
  const auto copy_keys = [&](int c) {
    auto& stage = shared.stage(c);
    copy_rows<D, kScanThreads>(rows(p.k, &places->k, c), stage.k);
    if constexpr (output) copy_rows<D, kScanThreads>(rows(p.q, &places->q, c), stage.q);
    commit_copies();
  };
  const auto copy_values = [&](int c) {
    copy_rows<kColumns, kWarpSize>(rows(p.v, &places->v, c), v_tile);
    commit_copies();
  };
  // What a chunk needs until it has its errors; what it needs from then on, of rows with decays of channels.
  const auto copy_T = [&](int c) {
    const int64_t place = first_place + int64_t{c} * heads;
    if constexpr (predicts) copy_prepared<kChunk>(x.prepared.T, place, shared.T);
    if constexpr (predicts && by_channel) copy_prepared<D>(x.prepared.reads_k, place, shared.stage(c).k);
    commit_copies();
  };
  const auto copy_rest = [&](int c) {
    const int64_t place = first_place + int64_t{c} * heads;
    if constexpr (output) copy_prepared<D>(x.prepared.reads_q, place, shared.stage(c).q);
    if constexpr (output) copy_prepared<kChunk>(x.prepared.P, place, shared.P);
    copy_prepared<D>(x.prepared.writes, place, shared.stage(c).writes);
    copy_decays<D>(x.prepared, place, shared.stage(c));
    commit_copies();
  };

  float S[D / 8][4];
  const bool first = span.begin == 0, last = span.end == span.chunks;
  load_state<D>(S, p, first ? p.h0 : x.before, first ? n : span.axis, h, column);
  uint32_t most = 0;  // the largest magnitude of all operands
  if (span.begin < span.end) {
    if constexpr (!by_channel) copy_keys(span.begin);
    copy_values(span.begin);
    copy_T(span.begin);
    if constexpr (by_channel) copy_rest(span.begin);
  }
  for (int c = span.begin; c < span.end; ++c) {
    const bool more = c + 1 < span.end;
    auto& stage = shared.stage(c);
    const Token token =
        load_token<predicts, decays>(p.beta, beta + int64_t{c} * kChunk * p.beta.t, tokens_of_chunk(s, c), x.prepared,
                                     first_place + int64_t{c} * heads);
    wait_copies<by_channel ? 1 : 0>();
    if constexpr (!by_channel) {
      most = larger(most, scale_rows<D, kScanThreads>(rows(p.k, &places->k, c), stage.k, stage.k_up));
      if constexpr (output)
        most = larger(most, scale_rows<D, kScanThreads>(rows(p.q, &places->q, c), stage.q, stage.q_up));
    }
    store_token<decays>(stage, shared.P_up, token);
    sync_block();  // the chunk is there, and the one before it is no longer needed
    if constexpr (!by_channel) {
      if (more) copy_keys(c + 1);
      if constexpr (output) most = larger(most, multiply_queries<D, decays>(stage, shared.P, shared.P_up));
    }

    uint32_t S_a[D / 16][4];
    Scale S_scale[2];
    most = larger(most, to_a(S_a, S_scale, S));
    float e[8][4];
    predict<D, predicts, decays>(e, stage, p.v.dtype, v_tile, S_a, S_scale);
    sync_warp();
    if (more) copy_values(c + 1);
    if constexpr (predicts) most = larger(most, solve(e, stage, shared.T));
    if (!output && x.S.numbers != nullptr && column < x.S.columns) {
      x.S.of(first_place + int64_t{c} * heads, column, kColumns).template store<D>(S_a, S_scale);
      if constexpr (predicts) x.E.store(first_place + int64_t{c} * heads, column, e);
    }
    if constexpr (by_channel) more ? wait_copies<1>() : wait_copies<0>();
    sync_block();  // P and what is written are there, and T' is no longer needed
    if (more) copy_T(c + 1);

    // U and W = e^(G_C - G) U, with the scales of the rows of P's and of the written keys
    uint32_t U[4][4], W[4][4];
    Scale U_scale[2], W_scale[2];
    FWP_UNROLL for (int i = 0; i < 8; ++i) {
      float k_up[2] = {1, 1}, strength[2];
      if constexpr (!by_channel) load_tokens(k_up, stage.k_up, i);
      load_tokens(strength, stage.beta, i);
      FWP_UNROLL for (int r = 0; r < 4; ++r) e[i][r] *= strength[r % 2] * k_up[r % 2];
    }
    if constexpr (output || decays == Decay::none) most = larger(most, tokens_to_a(U, U_scale, e));
    if constexpr (decays != Decay::none) {
      FWP_UNROLL for (int i = 0; i < 8; ++i) {
        float decay_left[2];
        load_tokens(decay_left, by_channel ? stage.writes_up : stage.decay_left, i);
        FWP_UNROLL for (int r = 0; r < 4; ++r) e[i][r] *= decay_left[r % 2];
      }
      most = larger(most, to_a(W, W_scale, e));
    }
    if constexpr (output)
      read<D, decays>(rows(p.o, &places->o, c), stage, static_cast<float>(p.scale), shared.P, shared.P_up, S_a, S_scale,
                      U, U_scale);
    if constexpr (decays == Decay::none)
      write<D>(S, stage.k, decay_of<decays>(stage), U, U_scale);
    else
      write<D>(S, by_channel ? stage.writes : stage.k, decay_of<decays>(stage), W, W_scale);
    if constexpr (by_channel) {
      sync_block();  // the chunk is no longer needed
      if (more) copy_rest(c + 1);
    }
  }
  Scale ignored[2];
  most = larger(most, row_scales(ignored, S));
  if (most >= kInfinite) raise(x.left + n * p.H + h);
  store_state<D>(S, p, last ? p.hT : x.after, last ? n : span.axis, h, column);
}

// Calls f with a scan's columns of keys, whether its rule predicts and its decay.
template <class F>
void with_variant(const Problem& p, const F& f) {
  with_size(p.K, [&](auto size) {
    const auto with_decay = [&](auto predicts) {
      if (p.decay == Decay::none) return f(size, predicts, std::integral_constant<Decay, Decay::none>());
      if (p.decay == Decay::scalar) return f(size, predicts, std::integral_constant<Decay, Decay::scalar>());
      f(size, predicts, std::integral_constant<Decay, Decay::channel>());
    };
    p.rule == Rule::delta ? with_decay(std::true_type()) : with_decay(std::false_type());
  });
}

template <bool output>
void run_scan(const Scan& x, Queue& queue) {
  const Problem& p = x.p;
  const Grid grid{(p.V + kValueTile - 1) / kValueTile * p.H * p.N};
  with_variant(p, [&](auto size, auto predicts, auto decays) {
    queue.run("chunk scan", scan<size(), predicts(), decays(), output>, grid, kScanThreads,
              shared_of<ScanShared<size(), decays()>, 2>(), x);
  });
}
// Without outputs: states alone, and what a backward saves of them.
void run_states_scan(const Scan& x, Queue& queue);

}  // namespace fwp::cuda::chunk
