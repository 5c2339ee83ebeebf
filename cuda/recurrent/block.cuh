// A block of C tokens of one head and its work on one tile of the state: what the kernels of both directions are made
// of.
//
// A thread is a column of the tile (its lane) in passes over the state, and a key channel in everything about keys. A
// warp has the same channels in both: 32 at a time, every `warps`-th such group. So rows of a tile, and the staged rows
// of keys, belong to one warp each, and warps meet in sums over channels only. Their order is that of the channels and
// warps, which K alone decides.
//
// Place is where what grows with K lies: shared memory, or the workspace where K is too large for that.
#pragma once

#include <cmath>

#include "../place.cuh"
#include "../rows.cuh"
#include "../rules.cuh"
//
#include "../../cpp/features/attention_norm.hpp"

namespace fwp::cuda::recurrent {

template <class T>
constexpr int kBlock = sizeof(T) == 8 ? 4 : 8;  // C
constexpr int kColumns = kWarpSize;             // value columns of a tile
constexpr int kTileRow = kColumns + 1;  // a channel of a tile: its columns, then z; odd, so that channels of one
                                        // column lie in different banks
constexpr int kMostWarps = 4;
template <class T>
constexpr int kRow = 3 * kBlock<T> + kQuad<T>;  // a channel of the staged rows: kr, qr, kw [C] each, then A

// n numbers from or to 16-byte aligned memory.
template <class Place, int n, class T>
FWP_DEVICE void load_row(const T* from, T* x) {
  static_assert(n % kQuad<T> == 0, "whole quads");
  FWP_UNROLL for (int i = 0; i < n; i += kQuad<T>) {
    const auto numbers = Place::load(reinterpret_cast<const Numbers<T>*>(from + i));
    FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) x[i + j] = numbers.x[j];
  }
}
template <class Place, int n, class T>
FWP_DEVICE void store_row(T* to, const T* x) {
  static_assert(n % kQuad<T> == 0, "whole quads");
  FWP_UNROLL for (int i = 0; i < n; i += kQuad<T>) {
    Numbers<T> numbers;
    FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) numbers.x[j] = x[i + j];
    Place::store(reinterpret_cast<Numbers<T>*>(to + i), numbers);
  }
}
// For texts that read an array.
template <class T>
struct SharedArray {
  const T* data;
  FWP_DEVICE T operator[](int i) const { return load_shared(data + i); }
};

FWP_DEVICE int warps() { return block_threads() / kWarpSize; }

// Calls f with a number of the type that an array of this dtype stores, where it is computed with in T.
template <class T, class F>
FWP_DEVICE void with_stored(DType dtype, const F& f) {
  if constexpr (sizeof(T) == 8) {
    if (dtype == DType::f64) return f(double());
    f(float());
  } else {
    if (dtype == DType::f32) return f(float());
    if (dtype == DType::f16) return f(Half());
    f(BFloat());
  }
}

// Numbers of C tokens, `step` apart: n of them, zeros for the others. No branches: in place of those, the last is read.
// Places are made one from the other, because compilers would keep all multiples of all steps in registers, and n is
// hidden, because they would keep all choices between a step and none, out of the caller's loop over channels.
template <class T, int C>
FWP_DEVICE void load_tokens(const Rows& rows, int64_t at, int64_t step, int n, T (&x)[C]) {
  FWP_UNROLL for (int t = 0; t < C; ++t) x[t] = 0;
  if (n <= 0) return;
  n = fresh(n);
  with_stored<T>(rows.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(rows.data) + at;
    FWP_UNROLL for (int t = 0; t < C; ++t) {
      const auto y = widened(load_global(from));
      x[t] = t < n ? static_cast<T>(y) : T(0);
      from += t + 1 < n ? step : 0;
    }
  });
}
// Numbers of n tokens; those which are this warp's part where all warps have them.
template <class T, int C>
FWP_DEVICE void store_tokens(const Rows& rows, int64_t at, int64_t step, int n, const T (&x)[C], int first = 0,
                             int of = 1) {
  with_stored<T>(rows.dtype, [&](auto type) {
    using X = decltype(type);
    auto* to = static_cast<X*>(rows.data) + at;
    int part = 0;
    FWP_UNROLL for (int t = 0; t < C; ++t) {
      if (t < n && part == first) store_global(to, Rounded<X>::of(static_cast<Accumulation<X>>(x[t])));
      part = part + 1 == of ? 0 : part + 1;
      to += step;
    }
  });
}

// Sums over the lanes of a warp of n numbers each, in one order. put(i, sum) is called once for each, by some lane.
template <int n, int mask = kWarpSize / 2, class T, class Put>
FWP_DEVICE void sum_lanes(T* x, const Put& put, int first = 0, bool mine = true) {
  if constexpr (mask == 0) {
    FWP_UNROLL for (int i = 0; i < n; ++i) if (mine) put(first + i, x[i]);
  } else if constexpr (n % 2 == 0) {  // one half of the sums goes on in the lanes below, the other in those above
    const bool above = (lane() & mask) != 0;
    FWP_UNROLL for (int i = 0; i < n / 2; ++i) {
      const T kept = above ? x[i + n / 2] : x[i], given = above ? x[i] : x[i + n / 2];
      x[i] = kept + shuffle_xor(given, mask);
    }
    sum_lanes<n / 2, mask / 2>(x, put, first + (above ? n / 2 : 0), mine);
  } else {
    FWP_UNROLL for (int i = 0; i < n; ++i) x[i] += shuffle_xor(x[i], mask);
    sum_lanes<n, mask / 2>(x, put, first, mine && (lane() & mask) == 0);
  }
}

// A number of a state after one token's decay; -1 stands for a reset, which clears by selection: not even NaN survives.
template <class T>
FWP_DEVICE T decayed(T x, T a) {
  return a < 0 ? T(0) : a * x;
}

// How many of n tokens the gates of a channel let into one block: those before any that, with the ones before it, might
// take a product of decays out of the range of T (cpp/scan/block.hpp). None, where the first is such a one: a reset
// (g = -inf) among them.
template <class T, int C>
FWP_DEVICE int in_range(const T (&g)[C], int n) {
  constexpr T kRange = sizeof(T) == 8 ? 600 : 60;
  T sum = 0;
  int tokens = 0;
  FWP_UNROLL for (int t = 0; t < C; ++t) {
    sum += g[t] < 0 ? -g[t] : g[t];
    if (t < n && sum <= kRange) tokens = t + 1;
  }
  return tokens;
}
template <class T>
FWP_DEVICE bool resets(T g) {
  return g == -static_cast<T>(HUGE_VAL);
}

// What a block of threads shares, whatever K; after it the sums of the warps over their channels,
// [warps][2C][kColumns].
template <class T>
struct alignas(16) Common {
  static constexpr int C = kBlock<T>;
  static constexpr int kSums = C * C + 2 * C;
  T MP[kSums];  // [C][C] of rules/block.hpp; then, with attention_norm, z0 . kr, z0 . qr
  T divisor[2 * C];
  int blind[2 * C];
  int fitting[kMostWarps];
  T sums[kMostWarps][kSums];  // of warps
};

// Of loops over rows; in the workspace there are no registers for more.
template <class Index>
constexpr int kUnroll = sizeof(Index) == 8 ? 1 : 4;

// The channels of one thread: for each, its own; and the rows of a tile of its warp.
template <class Index, class F>
FWP_DEVICE void for_channels(Index K, const F& f) {
  FWP_UNROLL_BY(1) for (Index d = thread_index(); d < K; d += block_threads()) f(d);
}
template <class Index, class F>
FWP_DEVICE void for_rows(Index K, const F& f) {
  for (Index first = warp() * kWarpSize; first < K; first += block_threads()) {
    const Index end = K - first < kWarpSize ? K : first + kWarpSize;
    FWP_UNROLL_BY(kUnroll<Index>) for (Index d = first; d < end; ++d) f(d);
  }
}

template <class T, class Rule, class Decay, class Place>
struct Block {
  static constexpr int C = kBlock<T>;

  using Index = typename Place::Index;

  const Problem& p;
  Sequence s;
  int h, tile;
  Common<T>* shared;
  T* column_sums;
  T* S;     // [K][kTileRow], Place
  T* rows;  // [K][kRow], Place

  FWP_DEVICE Index K() const { return static_cast<Index>(p.K); }
  FWP_DEVICE int64_t column() const { return int64_t{tile} * kColumns + lane(); }
  FWP_DEVICE bool there() const { return column() < p.V; }  // whether this thread's column is one of the V
  FWP_DEVICE int64_t at(const Rows& of, int64_t t) const { return row_at(of, s, t, h); }

  // Stages the tokens from t on, n of them or fewer, for the state S before them; returns how many. Every thread has
  // the rows of its channels then, and, after the next barrier, MP. queries: false where nothing is read.
  FWP_DEVICE int stage(int64_t t, int n, bool queries) const {
    for (;;) {
      int whole = multiply(t, n, queries);
      whole = whole > 1 ? whole : 1;
      if (whole == n && p.attention_norm) whole = divide(n);
      if (whole == n) break;
      n = whole;
      sync_block();  // before the sums are written again
    }
    sync_warp();
    return n;
  }

  // beta of the staged tokens.
  FWP_DEVICE void load_beta(int64_t t, int n, T (&beta)[C]) const {
    if (p.beta.data) return load_tokens(p.beta, at(p.beta, t), p.beta.t, n, beta);
    FWP_UNROLL for (int i = 0; i < C; ++i) beta[i] = i < n ? 1 : 0;
  }
  // This thread's column of rows of values, 0 beyond the V.
  FWP_DEVICE void load_column(const Rows& values, int64_t t, int n, T (&x)[C]) const {
    load_tokens(values, at(values, t) + column(), values.t, there() ? n : 0, x);
  }
  FWP_DEVICE void load_MP(T (&MP)[C * C]) const { load_row<InShared, C * C>(shared->MP, MP); }
  FWP_DEVICE bool blind(int read) const { return p.attention_norm && load_shared(shared->blind + read) != 0; }

  // out[r] = sum over the channels of staged row first + r (kr, qr, kw: C each) times this thread's column of a tile.
  template <int first, int count>
  FWP_DEVICE void read(const T* of, T (&out)[count]) const {
    T sum[count] = {};
    for_rows(K(), [&](Index d) {
      const T x = Place::load(of + d * kTileRow + lane());
      T row[count];
      load_row<Place, count>(rows + d * kRow<T> + first, row);
      FWP_UNROLL for (int r = 0; r < count; ++r) sum[r] += row[r] * x;
    });
    T* const of_warps = column_sums + lane();
    FWP_UNROLL for (int r = 0; r < count; ++r) store_shared(of_warps + (warp() * count + r) * kColumns, sum[r]);
    sync_block();
    FWP_UNROLL for (int r = 0; r < count; ++r) out[r] = load_shared(of_warps + r * kColumns);
    for (int w = 1; w < warps(); ++w)
      FWP_UNROLL for (int r = 0; r < count; ++r) out[r] += load_shared(of_warps + (w * count + r) * kColumns);
  }

  // S and z after the n staged tokens, from what they write in this thread's column.
  FWP_DEVICE void write(int n, T (&u)[C]) const {
    FWP_UNROLL for (int t = 0; t < C; ++t) u[t] = t < n ? u[t] : T(0);
    for_rows(K(), [&](Index d) {
      T* const at = S + d * kTileRow + lane();
      T x = Place::load(at), kw[C];
      load_row<Place, C>(rows + d * kRow<T> + 2 * C, kw);
      if constexpr (Decay::decays) x *= A(d);
      FWP_UNROLL for (int t = 0; t < C; ++t) x += kw[t] * u[t];
      Place::store(at, x);
    });
    if (p.attention_norm)
      for_channels(K(), [&](Index d) {
        T kw[C];
        load_row<Place, C>(rows + d * kRow<T> + 2 * C, kw);
        Place::store(z(S, d), gather<Decay, C>(Decay::decays ? A(d) : T(1), kw, Place::load(z(S, d))));
      });
    sync_warp();
  }

  // One block forward: from v and beta the errors e, what is written u and, if it is read, the output o, of this
  // thread's column; S moves on.
  template <bool output>
  FWP_DEVICE void advance(int n, const T (&v)[C], const T (&beta)[C], T (&e)[C], T (&u)[C], T (&o)[C]) const {
    constexpr int first = Rule::predicts ? 0 : C, end = output ? 2 * C : C;
    T RX[2 * C] = {}, MP[C * C];
    if constexpr (end > first) {
      T sum[end - first];
      read<first>(S, sum);
      FWP_UNROLL for (int r = first; r < end; ++r) RX[r] = Rule::predicts && blind(r) ? T(0) : sum[r - first];
    } else {
      sync_block();
    }
    load_MP(MP);
    block_fwd<Rule, C>(RX, RX + C, MP, v, beta, e, u, o);
    if constexpr (output) FWP_UNROLL for (int t = 0; t < C; ++t) if (blind(C + t)) o[t] = 0;
    write(n, u);
  }

  // This warp's rows of a state of the caller's, or zeros.
  FWP_DEVICE void load_state(const States& from, int64_t slot, T* to, bool with_z = true) const {
    const T* const state = static_cast<const T*>(from.data) + (from.data ? state_at(from, slot, h) : 0);
    for_rows(K(), [&](Index d) {
      Place::store(to + d * kTileRow + lane(),
                   from.data && there() ? load_global(state + d * from.k + column()) : T(0));
    });
    if (p.attention_norm)
      for_channels(K(), [&](Index d) {
        Place::store(z(to, d), from.data && with_z ? load_global(state + d * from.k + p.V) : T(0));
      });
    sync_warp();
  }
  FWP_DEVICE void store_state(const T* from, const States& to, int64_t slot, bool with_z) const {
    if (!to.data) return;
    T* const state = static_cast<T*>(to.data) + state_at(to, slot, h);
    if (there())
      for_rows(K(),
               [&](Index d) { store_global(state + d * to.k + column(), Place::load(from + d * kTileRow + lane())); });
    if (with_z && p.attention_norm)
      for_channels(K(), [&](Index d) { store_global(state + d * to.k + p.V, Place::load(z(from, d))); });
  }

  FWP_DEVICE void store_z(const T* of, T* to) const {
    for_channels(K(), [&](Index d) { store_global(to + d, Place::load(z(of, d))); });
  }
  // The output of a sequence that has no state.
  FWP_DEVICE void clear_output() const {
    const T zeros[C] = {};
    for (int64_t t = 0; t < s.length && there(); t += C) {
      const int tokens = static_cast<int>(s.length - t < C ? s.length - t : C);
      store_tokens(p.o, at(p.o, t) + column(), p.o.t, tokens, zeros, warp(), warps());
    }
  }

  // This warp's rows of a tile, as they are, to or from memory of the same shape.
  template <class From, class To>
  FWP_DEVICE void copy(const T* from, T* to) const {
    for (Index first = warp() * kWarpSize; first < K(); first += block_threads()) {
      const Index end = (K() - first < kWarpSize ? K() : first + kWarpSize) * kTileRow;
      FWP_UNROLL_BY(kUnroll<Index>)
      for (Index i = first * kTileRow + lane(); i < end; i += kWarpSize) To::store(to + i, From::load(from + i));
    }
    sync_warp();
  }

  FWP_DEVICE static T* z(T* of, Index d) { return of + d * kTileRow + kColumns; }
  FWP_DEVICE static const T* z(const T* of, Index d) { return of + d * kTileRow + kColumns; }
  FWP_DEVICE T A(Index d) const { return Place::load(rows + d * kRow<T> + 3 * C); }

  // Whether gates are those of channels. In the workspace one kernel serves all decays: others are the same in all.
  FWP_DEVICE bool per_channel() const { return Place::shared ? Decay::per_channel : p.decay == fwp::Decay::channel; }
  // Gates of the n tokens from t on, of channel d.
  FWP_DEVICE void load_gates(int64_t t, int n, Index d, T (&g)[C]) const {
    const bool none = !Place::shared && p.decay == fwp::Decay::none;
    load_tokens(p.g, at(p.g, t) + (per_channel() ? d : 0), p.g.t, none ? 0 : n, g);
  }

 private:
  // The rows of n tokens and the sums over all channels. Returns how many tokens the gates let into the block; where it
  // is less than n, what was made is of no use.
  FWP_DEVICE int multiply(int64_t t, int n, bool queries) const {
    const T factor = p.attention_norm ? 1 : static_cast<T>(p.scale);
    T x[C * C] = {}, a[C] = {};
    int fitting = n;
    bool clears = false;
    const auto decay = [&](Index d) {
      load_gates(t, n, d, a);
      const int tokens = in_range(a, n);
      fitting = tokens < fitting ? tokens : fitting;
      clears = n == 1 && resets(a[0]);
      FWP_UNROLL for (int i = 0; i < C; ++i) a[i] = exponential(a[i]);
    };
    if constexpr (Decay::decays && !Decay::per_channel) decay(0);
    for_channels(K(), [&](Index d) {
      if constexpr (Decay::per_channel) decay(d);
      if (clears) clear(S, d);
      T k[C], q[C] = {}, A_d{}, row[3 * C];
      load_tokens(p.k, at(p.k, t) + d, p.k.t, n, k);
      if (queries) {
        load_tokens(p.q, at(p.q, t) + d, p.q.t, n, q);
        FWP_UNROLL for (int i = 0; i < C; ++i) q[i] *= factor;
      }
      decay_block_fwd<Decay, Rule::predicts, C>(k, q, a, A_d, row, row + C, row + 2 * C, x);
      T* const to = rows + d * kRow<T>;
      store_row<Place, 3 * C>(to, row);
      if constexpr (Decay::decays) Place::store(to + 3 * C, A_d);
    });

    T* const sums = shared->sums[warp()];
    const auto put = [&](int i, T sum) { store_shared(sums + i, sum); };
    sum_lanes<C * C>(x, put);
    if (p.attention_norm) {
      T of_z[2 * C] = {};
      for_channels(K(), [&](Index d) {
        T row[2 * C];
        load_row<Place, 2 * C>(rows + d * kRow<T>, row);
        add_gathered<Rule::predicts, C>(row, Place::load(z(S, d)), of_z);
      });
      sum_lanes<2 * C>(of_z, put, C * C);
    }
    if constexpr (Decay::per_channel) {
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
        const int other = shuffle_xor(fitting, mask);
        fitting = other < fitting ? other : fitting;
      }
      if (lane() == 0) store_shared(shared->fitting + warp(), fitting);
    }
    sync_block();
    if constexpr (Decay::per_channel)
      for (int w = 0; w < warps(); ++w) {
        const int other = load_shared(shared->fitting + w);
        fitting = other < fitting ? other : fitting;
      }
    const int count = p.attention_norm ? Common<T>::kSums : C * C;
    for (int m = thread_index(); m < count; m += block_threads()) {
      T sum = load_shared(shared->sums[0] + m);
      for (int w = 1; w < warps(); ++w) sum += load_shared(shared->sums[w] + m);
      store_shared(shared->MP + m, sum);
    }
    return fitting;
  }

  // Divides the rows and MP by what attention_norm says. Returns where the block has to end: before any token whose
  // prediction is 0 because it shares nothing with z. Such a token stands first, where no NaN of the block can reach
  // it.
  FWP_DEVICE int divide(int n) const {
    sync_block();
    for (int r = thread_index(); r < 2 * C; r += block_threads()) {
      const T sum = gathered<Rule::predicts, C>(r, load_shared(shared->MP + C * C + r), SharedArray<T>{shared->MP});
      store_shared(shared->divisor + r, sum + static_cast<T>(p.eps));
      store_shared(shared->blind + r, r % C >= n || sum == 0 ? 1 : 0);
    }
    sync_block();
    for (int t = 1; t < n && Rule::predicts; ++t)
      if (blind(t)) return t;
    const T scale = static_cast<T>(p.scale);
    const auto divide_one = [&](int r, T x) {
      return divided(x, r < C ? T(1) : scale, load_shared(shared->divisor + r), blind(r));
    };
    for_channels(K(), [&](Index d) {
      T row[2 * C], *const at = rows + d * kRow<T>;
      load_row<Place, 2 * C>(at, row);
      FWP_UNROLL for (int r = Rule::predicts ? 0 : C; r < 2 * C; ++r) row[r] = divide_one(r, row[r]);
      store_row<Place, 2 * C>(at, row);
    });
    for (int m = thread_index(); m < C * C; m += block_threads())
      store_shared(shared->MP + m, divide_one(read_of<C>(m), load_shared(shared->MP + m)));
    return n;
  }

  // Clears a channel of a tile, by selection: of what was there nothing survives, not even NaN.
  FWP_DEVICE static void clear(T* of, Index d) {
    for (int j = 0; j < kTileRow; ++j) Place::store(of + d * kTileRow + j, T(0));
  }
};

}  // namespace fwp::cuda::recurrent
