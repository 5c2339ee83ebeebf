// Backward. Forward leaves a checkpoint of the state every `segment` tokens. Each segment is run forward once more,
// keeping the state before every C tokens, and then backward with the adjoint D of the state, so that every gradient,
// dg = <dS', S'> among them, sees the state and its adjoint side by side.
//
// A block of threads has a tile of value columns of one head. What the tiles of a head, and the heads of a group, have
// to add to one gradient goes to partial rows, which a second kernel adds up in order and rounds once. There is room
// for those of a window of tokens: it goes over all sequences from their ends to their begins.
#pragma once

#include "backward.hpp"
#include "forward.cuh"

namespace fwp::cuda::recurrent {

// What threads share beside Common.
template <class T>
struct alignas(16) Adjoints {
  static constexpr int C = kBlock<T>;
  static constexpr int kColumnRow = 4 * C + kQuad<T>;
  T columns[kColumns][kColumnRow];  // of each value column -de, do, u and p * e of all tokens
  T dMP[C * C];
  T sums[kMostWarps][2 * C];  // of warps over their channels: <dkr, kr>, <dqr, qr>; dg of a scalar gate
  T d_sum[2 * C];             // features/attention_norm.hpp
};

enum Field { kQ, kK, kV, kBeta, kG, kFields };

// Where one gradient goes.
template <class T>
struct Gradient {
  Rows to;           // the caller's; no data: nowhere
  T* partial;        // [rows][H][tiles][width], to be added up; nullptr: straight there
  int64_t width;     // numbers of a partial row
  int64_t numbers;   // of a row of the caller's
  bool tiles_share;  // in one row: else each tile has its own columns of it
};

template <class T>
struct BackwardPlan {
  ForwardPlan<T> forward;
  Wanted wanted;
  Checkpoints<T> checkpoints;
  Cut cut;
  int64_t tiles;
  Room<T> room;
  int64_t rows;  // of partial sums per strip: a window ends with the segment that it ends in
  bool whole;    // one window holds all tokens: rows of partial sums are those of the call
  Gradient<T> gradients[kFields];
  T* workspace;
  T* adjoints;  // [blocks] tiles: D between windows
  T* states;    // [blocks][segment / C] tiles
  T* errors;    // [blocks][segment][kColumns]
  T* dz;        // [N][H][tiles][K], to be added up

  BackwardPlan(const Problem& p, const Cut& of, const int32_t* only, Arena& arena);

  int64_t blocks(const Problem& p) const { return cut.strips * p.H * tiles; }
  FWP_DEVICE int first_sequence(const Problem& p, int64_t strip) const {
    return static_cast<int>(strip * p.N / cut.strips);
  }
  // Of token `at` among all of the call, in the window that begins with token `begin`.
  FWP_DEVICE int64_t row(int64_t strip, int64_t at, int64_t begin) const {
    return whole ? at : strip * rows + at - begin;
  }
};

template <class T, class Rule, class Decay, class Place>
struct Backward {
  static constexpr int C = kBlock<T>;
  using Tile = Block<T, Rule, Decay, Place>;
  using Index = typename Place::Index;

  const Problem& p;
  const BackwardPlan<T>& plan;
  Tile block;
  T* D;  // adjoint of the state after what is to come, as S; dz in its last column
  Adjoints<T>* shared;
  int64_t first_row;  // of partial sums, that of the sequence's first token

  // The tokens from t0 on, S being the state before them: forward to the last one, and from there C tokens at a time
  // back, each time from the state before them; gates may cut them into several blocks, the last of which is next.
  FWP_DEVICE void segment(int64_t t0, int tokens) const {
    const int64_t size = p.K * kTileRow, number = block_index_x();
    T* const states = plan.states + number * (plan.cut.segment / C) * size;
    T* const errors = plan.errors + number * plan.cut.segment * kColumns;
    bool forward = true;
    for (int at = 0, last = tokens; last > 0;) {
      T* const state = states + at / C * size;
      T* const e = errors + at * kColumns + lane();
      if (forward && at % C == 0) block.template copy<Place, InWorkspace>(block.S, state);
      if (!forward && at % C == 0) block.template copy<InWorkspace, Place>(state, block.S);
      const int next = (at / C + 1) * C;
      const int n = block.stage(t0 + at, (next < last ? next : last) - at, !forward);
      if (forward || at + n < last) {
        advance(t0 + at, n, e, forward);
        at += n;
      } else {
        retreat(t0 + at, n, e);
        last = at;
        at = (last - 1) / C * C;
      }
      if (forward && at == tokens) {
        forward = false;
        at = (tokens - 1) / C * C;
        sync_block();  // errors
      }
    }
  }

 private:
  FWP_DEVICE int width() const {  // columns of the tile that are there
    const int64_t left = p.V - int64_t{block.tile} * kColumns;
    return left < kColumns ? static_cast<int>(left) : kColumns;
  }

  FWP_DEVICE void advance(int64_t t, int n, T* e_of_tokens, bool keep) const {
    T v[C], beta[C], e[C], u[C], o[C];
    block.load_column(p.v, t, n, v);
    block.load_beta(t, n, beta);
    block.template advance<false>(n, v, beta, e, u, o);
    if (Rule::predicts && keep)
      FWP_UNROLL for (int i = 0; i < C; ++i) if (i < n && i % warps() == warp())
          store_global(e_of_tokens + i * kColumns, e[i]);
  }

  // The n staged tokens backward: S is the state before them, D the adjoint of that after them, in place that before.
  FWP_DEVICE void retreat(int64_t t, int n, const T* e_of_tokens) const {
    write_columns(t, n, e_of_tokens);
    sync_block();
    sum_columns(t, n);
    pass_state(t, n);
    sync_block();
    if (p.attention_norm) undo_division(n);
    key_gradients(t, n);
  }

  // What the value columns have: p and de from Z and do.
  FWP_DEVICE void write_columns(int64_t t, int n, const T* e_of_tokens) const {
    T d_o[C], e[C], beta[C], Z[C], write_adjoint[C], de[C], x[4 * C];
    block.load_column(p.d_o, t, n, d_o);
    block.load_beta(t, n, beta);
    if constexpr (Rule::predicts) {
      FWP_UNROLL for (int i = 0; i < C; ++i) e[i] = i < n ? load_global(e_of_tokens + i * kColumns) : T(0);
    } else {
      block.load_column(p.v, t, n, e);
    }
    block.template read<2 * C>(D, Z);
    FWP_UNROLL for (int i = 0; i < C; ++i) d_o[i] = block.blind(C + i) ? T(0) : d_o[i];
    block_bwd<Rule, C>(Z, SharedArray<T>{block.shared->MP}, d_o, beta, write_adjoint, de);
    FWP_UNROLL for (int i = 0; i < C; ++i) {
      de[i] = i < n ? de[i] : T(0);  // rows beyond the last token must not reach D
      x[i] = Rule::predicts && !block.blind(i) ? -de[i] : T(0);
      x[C + i] = d_o[i];
      x[2 * C + i] = i < n ? beta[i] * e[i] : T(0);
      x[3 * C + i] = i < n ? write_adjoint[i] * e[i] : T(0);
    }
    FWP_UNROLL for (int i = 0; i < 4; ++i) if (i % warps() == warp())
        store_row<InShared, C>(shared->columns[lane()] + i * C, x + i * C);
    if (block.there()) put(kV, t, n, lane(), de, warp(), warps());
  }

  // dP_ti = do_t . u_i for i <= t and dM_ti = -de_t . u_i for i < t in the square dMP; dbeta_t = sum of p_t e_t.
  FWP_DEVICE void sum_columns(int64_t t, int n) const {
    for (int m = thread_index(); m < C * C + C; m += block_threads()) {
      const int a = m / C, b = m % C;
      const bool is_beta = m >= C * C, is_M = a > b;
      const int x = is_beta ? 3 * C + b : is_M ? a : C + b, u = 2 * C + (is_M ? b : a);
      T sum = 0;
      for (int j = 0; j < width(); ++j) {
        const T value = load_shared(shared->columns[j] + x);
        sum += is_beta ? value : value * load_shared(shared->columns[j] + u);
      }
      if (!is_beta)
        store_shared(shared->dMP + m, is_M && !Rule::predicts ? T(0) : sum);
      else if (b < n)
        put_one(kBeta, t + b, sum);
    }
  }

  // What meets the state: dqr = dO S^T, dkr = -dE S^T, dkw = U D^T and H = sum over columns of S D, in place of the
  // staged rows; D moves on.
  FWP_DEVICE void pass_state(int64_t t, int n) const {
    T shares[2 * C] = {};
    for_channels(block.K(), [&](Index d) {
      T row[2 * C], sums[3 * C] = {}, H = 0;
      T* const at = block.rows + d * kRow<T>;
      load_row<Place, 2 * C>(at, row);
      const T A = Decay::decays ? block.A(d) : T(1);
      const bool cleared = clears(t, n, d);
      for (int j = 0; j < width(); ++j) {
        const T S = Place::load(block.S + d * kTileRow + j);
        T x = Place::load(D + d * kTileRow + j), column[3 * C];
        load_row<InShared, 3 * C>(shared->columns[j], column);
        FWP_UNROLL for (int i = 0; i < C; ++i) {
          if constexpr (Rule::predicts) sums[i] += S * column[i];
          sums[C + i] += S * column[C + i];
          sums[2 * C + i] += x * column[2 * C + i];
        }
        if constexpr (Decay::decays) {
          H += S * x;
          x *= A;
        }
        FWP_UNROLL for (int i = Rule::predicts ? 0 : C; i < 2 * C; ++i) x += row[i] * column[i];
        Place::store(D + d * kTileRow + j, cleared ? T(0) : x);
      }
      if (p.attention_norm)
        FWP_UNROLL for (int i = Rule::predicts ? 0 : C; i < 2 * C; ++i) shares[i] += sums[i] * row[i];
      store_row<Place, 3 * C>(at, sums);
      if constexpr (Decay::decays) Place::store(at + 3 * C, H);
    });
    if (p.attention_norm) sum_lanes<2 * C>(shares, [&](int i, T sum) { store_shared(shared->sums[warp()] + i, sum); });
  }

  // attention_norm: the adjoints of what reads were divided by, and of the dot products as they were before.
  FWP_DEVICE void undo_division(int n) const {
    const auto& of_block = *block.shared;
    for (int r = thread_index(); r < 2 * C; r += block_threads()) {
      T sum = load_shared(shared->sums[0] + r);
      for (int w = 1; w < warps(); ++w) sum += load_shared(shared->sums[w] + r);
      sum = gathered_adjoint<Rule::predicts, C>(r, sum, SharedArray<T>{of_block.MP}, SharedArray<T>{shared->dMP},
                                                load_shared(of_block.divisor + r), block.blind(r));
      store_shared(shared->d_sum + r, sum);
    }
    sync_block();
    const T scale = static_cast<T>(p.scale);
    for (int m = thread_index(); m < C * C; m += block_threads()) {
      const int r = read_of<C>(m);
      if (r % C >= n || (!Rule::predicts && r < C)) continue;
      store_shared(shared->dMP + m,
                   divided_bwd(load_shared(shared->dMP + m), r < C ? T(1) : scale, load_shared(of_block.divisor + r),
                               block.blind(r), load_shared(shared->d_sum + r), T(1)));
    }
    sync_block();
  }

  // dk, dq and dg from the sums over the columns.
  FWP_DEVICE void key_gradients(int64_t t, int n) const {
    const T factor = p.attention_norm ? 1 : static_cast<T>(p.scale);
    T dg_sum[C] = {};
    for_channels(block.K(), [&](Index d) {
      T k[C], q[C], a[C] = {}, sums[3 * C], dk[C], dq[C], dg[C], H = 0;
      load_tokens(p.k, block.at(p.k, t) + d, p.k.t, n, k);
      load_tokens(p.q, block.at(p.q, t) + d, p.q.t, n, q);
      FWP_UNROLL for (int i = 0; i < C; ++i) q[i] *= factor;
      const bool cleared = clears(t, n, d);
      if constexpr (Decay::decays) {
        block.load_gates(t, n, d, a);
        FWP_UNROLL for (int i = 0; i < C; ++i) a[i] = exponential(a[i]);
        H = Place::load(block.rows + d * kRow<T> + 3 * C);
      }
      load_row<Place, 3 * C>(block.rows + d * kRow<T>, sums);
      FWP_UNROLL for (int i = 0; i < 3 * C; ++i) sums[i] = i % C < n ? sums[i] : T(0);
      if (p.attention_norm) undo_division(n, d, k, q, a, sums, H, cleared);
      decay_block_bwd<Decay, Rule::predicts, C>(k, q, a, sums, sums + C, sums + 2 * C, SharedArray<T>{shared->dMP}, H,
                                                dk, dq, dg);
      FWP_UNROLL for (int i = 0; i < C; ++i) dq[i] *= factor;
      put(kQ, t, n, d, dq);
      put(kK, t, n, d, dk);
      if constexpr (Decay::decays) {
        dg[0] = cleared ? T(0) : dg[0];
        if (block.per_channel())
          put(kG, t, n, d, dg);
        else
          FWP_UNROLL for (int i = 0; i < C; ++i) dg_sum[i] += dg[i];
      }
    });
    if (Decay::decays && !block.per_channel()) {
      sum_lanes<C>(dg_sum, [&](int i, T sum) { store_shared(shared->sums[warp()] + i, sum); });
      sync_block();
      for (int i = thread_index(); i < n; i += block_threads()) {
        T sum = load_shared(shared->sums[0] + i);
        for (int w = 1; w < warps(); ++w) sum += load_shared(shared->sums[w] + i);
        put_one(kG, t + i, sum);
      }
    }
  }

  // The same for one channel, and dz moves on.
  FWP_DEVICE void undo_division(int n, Index d, const T (&k)[C], const T (&q)[C], const T (&a)[C], T (&sums)[3 * C],
                                T& H, bool cleared) const {
    T divisor[2 * C], d_sum[2 * C];
    bool blind[2 * C];
    load_row<InShared, 2 * C>(block.shared->divisor, divisor);
    load_row<InShared, 2 * C>(shared->d_sum, d_sum);
    FWP_UNROLL for (int r = 0; r < 2 * C; ++r) blind[r] = block.blind(r);
    T dz = Place::load(Tile::z(D, d));
    attention_norm_bwd<Decay, Rule::predicts, C>(k, q, a, divisor, blind, d_sum, static_cast<T>(p.scale), n,
                                                 Place::load(Tile::z(block.S, d)), sums, sums + C, sums + 2 * C, H, dz);
    Place::store(Tile::z(D, d), cleared ? T(0) : dz);
  }

  // Whether the first of n staged tokens clears channel d: it stands alone then.
  FWP_DEVICE bool clears(int64_t t, int n, Index d) const {
    if constexpr (!Decay::decays) return false;
    if (n != 1) return false;
    T g[C];
    block.load_gates(t, n, d, g);
    return resets(g[0]);
  }

  // Number i of the rows of tokens t.. of a gradient, or of this tile's part of it.
  FWP_DEVICE void put(Field field, int64_t t, int n, int64_t i, const T (&x)[C], int first = 0, int of = 1) const {
    const Gradient<T>& gradient = plan.gradients[field];
    if (gradient.to.data == nullptr) return;
    const Rows to = rows_of(gradient);
    store_tokens(to, at(gradient, t) + i, to.t, n, x, first, of);
  }
  FWP_DEVICE void put_one(Field field, int64_t t, T x) const {
    const Gradient<T>& gradient = plan.gradients[field];
    if (gradient.to.data != nullptr) store_number(rows_of(gradient), at(gradient, t), x);
  }
  FWP_DEVICE Rows rows_of(const Gradient<T>& gradient) const {
    if (gradient.partial == nullptr) return gradient.to;
    return {gradient.partial, sizeof(T) == 8 ? DType::f64 : DType::f32, 0, p.H * plan.tiles * gradient.width, 0, 1};
  }
  FWP_DEVICE int64_t at(const Gradient<T>& gradient, int64_t t) const {
    if (gradient.partial == nullptr)
      return block.at(gradient.to, t) + (gradient.tiles_share ? 0 : block.tile * gradient.width);
    return (((first_row + t) * p.H + block.h) * plan.tiles + block.tile) * gradient.width;
  }
};

template <class T, class Rule, class Decay, class Place>
FWP_KERNEL void scan_backward(FWP_PARAMETER Problem p, FWP_PARAMETER BackwardPlan<T> plan, int64_t window) {
  const int64_t number = block_index_x(), strip = number / plan.tiles / p.H, size = p.K * kTileRow;
  const int h = static_cast<int>(number / plan.tiles % p.H), tile = static_cast<int>(number % plan.tiles);
  const int first = plan.first_sequence(p, strip), last = plan.first_sequence(p, strip + 1);
  const int64_t begin = first_token(p, first) + window * plan.cut.window;
  const int64_t end = plan.whole ? INT64_MAX : begin + plan.cut.window;
  const int64_t segment = plan.cut.segment;
  auto block = block_of<T, Rule, Decay, Place>(p, {}, h, tile, number, plan.room, plan.workspace);
  T* const D = block.S + size;
  T* const kept = plan.adjoints + number * size;
  auto* const shared = reinterpret_cast<Adjoints<T>*>(static_cast<char*>(shared_memory()) + plan.room.fixed) - 1;

  bool goes_on = false, started = false;  // whether D is that of a sequence whose begin is not reached
  for (int n = last - 1; n >= first; --n) {
    const int64_t begins = first_token(p, n);
    if (begins >= end || !plan.wanted(p, n, h)) continue;
    block.s = sequence(p, n);
    const int64_t length = block.s.length, reach = (length < end - begins ? length : end - begins) - 1;
    for (int64_t t0 = reach / segment * segment; t0 >= 0 && begins + t0 >= begin; t0 -= segment) {
      const int64_t left = length - t0;
      if (left <= segment)
        block.load_state(p.d_hT, n, D, tile == 0);
      else if (!started)
        block.template copy<InWorkspace, Place>(kept, D);
      if (t0 == 0)
        block.load_state(p.h0, n, block.S);
      else
        block.template copy<InWorkspace, Place>(plan.checkpoints.at(p, begins, t0, h, tile, plan.tiles), block.S);
      const Backward<T, Rule, Decay, Place> backward{p, plan, block, D, shared, plan.row(strip, begins, begin)};
      backward.segment(t0, static_cast<int>(left < segment ? left : segment));
      started = true;
      goes_on = t0 > 0;
      if (goes_on) continue;
      block.store_state(D, p.dh0, n, false);
      if (p.attention_norm)
        for_channels(block.K(), [&](typename Place::Index d) {
          store_global(plan.dz + ((n * p.H + h) * plan.tiles + tile) * p.K + d, Place::load(block.z(D, d)));
        });
      sync_warp();
    }
    if (begins < begin) break;
  }
  if (goes_on) block.template copy<Place, InWorkspace>(D, kept);
}

// The sequence of token `at` of all tokens of the call.
FWP_DEVICE int64_t sequence_of(const Problem& p, int64_t at) {
  if (p.cu_seqlens == nullptr) return at / p.T;
  int64_t low = 0, high = p.N;  // it begins at or before the token, the next one of those after it
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (load_global(p.cu_seqlens + middle) <= at ? low : high) = middle;
  }
  return low;
}

// One token of a window: partial rows added up, first those of the tiles of a head, then those of heads.
template <class T>
FWP_KERNEL void add_rows(FWP_PARAMETER Problem p, FWP_PARAMETER BackwardPlan<T> plan, int64_t window) {
  const int64_t row = block_index_x();
  int64_t token = row;
  if (!plan.whole) {
    const int64_t strip = row / plan.rows;
    const int64_t begin = first_token(p, plan.first_sequence(p, strip)) + window * plan.cut.window;
    token = begin + row % plan.rows;
    if (token >= first_token(p, plan.first_sequence(p, strip + 1))) return;
    const int64_t begins = first_token(p, sequence_of(p, token));
    const int64_t segment = begins + (token - begins) / plan.cut.segment * plan.cut.segment;
    if (segment < begin || segment >= begin + plan.cut.window) return;
  }
  const int64_t n = sequence_of(p, token), t = token - first_token(p, n);
  if (!plan.wanted.any(p, n)) return;
  const Sequence s = sequence(p, n);
  for (int f = 0; f < kFields; ++f) {
    const Gradient<T>& gradient = plan.gradients[f];
    if (gradient.to.data == nullptr || gradient.partial == nullptr) continue;
    const int64_t group = gradient.to.group, head = plan.tiles * gradient.width;
    for (int64_t i = thread_index(); i < p.H / group * gradient.numbers; i += block_threads()) {
      const int64_t h = i / gradient.numbers * group, number = i % gradient.numbers;
      if (!plan.wanted(p, n, h)) continue;
      const T* const from = gradient.partial + (row * p.H + h) * head + number;
      T sum = 0;
      for (int64_t of_group = 0; of_group < group; ++of_group) {
        T of_head = load_global(from + of_group * head);
        for (int64_t tile = 1; tile < plan.tiles && gradient.tiles_share; ++tile)
          of_head += load_global(from + of_group * head + tile * gradient.width);
        sum = of_group == 0 ? of_head : sum + of_head;
      }
      store_number(gradient.to, row_at(gradient.to, s, t, h) + number, sum);
    }
  }
}

// The last column of dh0: what the tiles of a head have of it.
template <class T>
FWP_KERNEL void add_z(FWP_PARAMETER Problem p, FWP_PARAMETER BackwardPlan<T> plan) {
  const int64_t n = block_index_x() / p.H, h = block_index_x() % p.H;
  if (!plan.wanted(p, n, h)) return;
  const T* const from = plan.dz + (n * p.H + h) * plan.tiles * p.K;
  T* const to = static_cast<T*>(p.dh0.data) + state_at(p.dh0, n, h) + p.V;
  for_channels(p.K, [&](int64_t d) {
    T sum = load_global(from + d);
    for (int64_t tile = 1; tile < plan.tiles; ++tile) sum += load_global(from + tile * p.K + d);
    store_global(to + d * p.dh0.k, sum);
  });
}

}  // namespace fwp::cuda::recurrent
