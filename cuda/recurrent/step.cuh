// Decoding: a block of threads takes a tile of a state into registers, once, and through the tokens of a call; both
// reads of a token are of S' = diag(a) S, so that nothing else passes over the state:
//
//   R = S'^T k    X = S'^T q    e, u, o from R, X and q.k (block_fwd, C = 1)    S = S' + k u^T
//
// A thread has 16 bytes of columns, eight threads those of a tile, and the other lanes and warps are on other channels:
// a load of a warp is four whole lines. Sums over channels have one order, which K alone decides.
#pragma once

#include "block.cuh"

namespace fwp::cuda::recurrent {

constexpr int kStepThreads = 128;
constexpr int kAcross = 8;                     // threads for the columns of a tile
constexpr int kDown = kStepThreads / kAcross;  // and for its channels, each with every kDown-th of them
constexpr int kStepWarps = kStepThreads / kWarpSize;
template <class T>
constexpr int kStepColumns = kAcross * kQuad<T>;

// Where the threads of a block meet.
template <class T>
struct StepRoom {
  static constexpr int kColumns = kStepColumns<T>;
  int K;
  T* base;

  FWP_DEVICE T* k(int d) const { return base + d; }
  FWP_DEVICE T* q(int d) const { return base + K + d; }      // with the scale, but not with attention_norm
  FWP_DEVICE T* a(int d) const { return base + 2 * K + d; }  // below 0: the channel is cleared
  FWP_DEVICE T* z(int d) const { return base + 3 * K + d; }
  FWP_DEVICE T* u(int column) const { return base + 4 * K + column; }
  FWP_DEVICE T* sums(int of_warp, int read) const { return u((1 + 2 * of_warp + read) * kColumns); }

  static int64_t numbers(int64_t K) { return 4 * K + (1 + 2 * kStepWarps) * kColumns; }
};

// A number of an array on its way: what it is will be asked where it is used, so that many are on their way at once.
template <class T>
struct Coming {
  using Less = std::conditional_t<sizeof(T) == 8, float, Half>;
  T full = 0;
  Less less{};

  FWP_DEVICE void load(const Rows& rows, int64_t at) {
    if (rows.dtype == kDType<T>)
      full = load_global(static_cast<const T*>(rows.data) + at);
    else
      less = load_global(static_cast<const Less*>(rows.data) + at);
  }
  FWP_DEVICE T number(DType dtype) const {
    if (dtype == kDType<T>) return full;
    if constexpr (sizeof(T) == 8)
      return static_cast<T>(less);
    else
      return dtype == DType::f16 ? to_float(less) : to_float(BFloat{less.bits});
  }
};

// A thread's part of a tile of a state in the caller's memory.
template <class T>
struct StepTile {
  T* data;         // its first number
  int64_t stride;  // from channel to channel
  int K, width;    // channels; columns of the tile
  bool wide;       // its columns are neighbours, and aligned to be read at once

  FWP_DEVICE static int first_channel() { return warp() * (kWarpSize / kAcross) + lane() / kAcross; }
  // Of this thread's j-th column, in the tile.
  FWP_DEVICE int column(int j) const { return wide ? lane() % kAcross * kQuad<T> + j : lane() % kAcross + j * kAcross; }

  FWP_DEVICE StepTile(T* tile, int64_t channel_stride, int64_t channels, int columns, bool is_wide)
      : stride(channel_stride), K(static_cast<int>(channels)), width(columns), wide(is_wide) {
    data = tile + first_channel() * stride + column(0);
  }

  // f(address, the numbers there) for each of its channels.
  template <int kChannels, class F>
  FWP_DEVICE void each(T (&S)[kChannels][kQuad<T>], const F& f) const {
    T* at = data;
    FWP_UNROLL for (int i = 0; i < kChannels; ++i, at += kDown * stride) if (first_channel() + i * kDown < K)
        f(at, S[i]);
  }
  // Zeros where there is nothing.
  template <int kChannels>
  FWP_DEVICE void load(T (&S)[kChannels][kQuad<T>]) const {
    FWP_UNROLL for (int i = 0; i < kChannels; ++i) FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) S[i][j] = 0;
    if (wide && column(0) < width)
      each(S, [](const T* at, T(&x)[kQuad<T>]) {
        const auto numbers = load_global(reinterpret_cast<const Numbers<T>*>(at));
        FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) x[j] = numbers.x[j];
      });
    if (!wide)
      each(S, [this](const T* at, T(&x)[kQuad<T>]) {
        FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) if (column(j) < width) x[j] = load_global(at + j * kAcross);
      });
  }
  template <int kChannels>
  FWP_DEVICE void store(T (&S)[kChannels][kQuad<T>]) const {
    if (wide && column(0) < width)
      each(S, [](T* at, const T(&x)[kQuad<T>]) {
        Numbers<T> numbers;
        FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) numbers.x[j] = x[j];
        store_global(reinterpret_cast<Numbers<T>*>(at), numbers);
      });
    if (!wide)
      each(S, [this](T* at, const T(&x)[kQuad<T>]) {
        FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) if (column(j) < width) store_global(at + j * kAcross, x[j]);
      });
  }
};

// How the tiles of a head are shared out: with attention_norm one block has all of them, since z is read before any of
// them and written after the last.
struct StepShape {
  int64_t tiles, tiles_of_block;
  bool wide;
};

template <class T, int kChannels>
struct Step {
  const Problem& p;
  StepRoom<T> room;
  Sequence s;
  int64_t h;

  // Token t where all threads see it: keys, queries and decays. z becomes z'.
  FWP_DEVICE void stage(int64_t t) const {
    const int64_t k_at = row_at(p.k, s, t, h), q_at = row_at(p.q, s, t, h);
    const bool per_channel = p.decay == fwp::Decay::channel;
    FWP_UNROLL_BY(1)
    for (int d = thread_index(); d < room.K; d += kStepThreads) {
      Coming<T> k, q, g;
      k.load(p.k, k_at + d);
      q.load(p.q, q_at + d);
      if (p.decay != fwp::Decay::none) g.load(p.g, row_at(p.g, s, t, h) + (per_channel ? d : 0));
      const T gate = p.decay != fwp::Decay::none ? g.number(p.g.dtype) : T(0),
              a = resets(gate) ? T(-1) : exponential(gate);
      store_shared(room.k(d), k.number(p.k.dtype));
      store_shared(room.q(d), p.attention_norm ? q.number(p.q.dtype) : q.number(p.q.dtype) * static_cast<T>(p.scale));
      store_shared(room.a(d), a);
      if (p.attention_norm) store_shared(room.z(d), decayed(load_shared(room.z(d)), a));
    }
  }

  // x . y of staged rows, in every lane of every warp.
  FWP_DEVICE T dot(const T* x, const T* y) const {
    T sum = 0;
    FWP_UNROLL_BY(1)
    for (int d = lane(); d < room.K; d += kWarpSize) sum += load_shared(x + d) * load_shared(y + d);
    FWP_UNROLL for (int mask = 1; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  // S', and the part of this thread's channels in R and X.
  FWP_DEVICE void read(T (&S)[kChannels][kQuad<T>], T (&RX)[2 * kQuad<T>]) const {
    FWP_UNROLL for (int i = 0; i < kChannels; ++i) {
      const int d = StepTile<T>::first_channel() + i * kDown;
      if (d >= room.K) break;
      const T k = load_shared(room.k(d)), q = load_shared(room.q(d)), a = load_shared(room.a(d));
      FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) {
        S[i][j] = decayed(S[i][j], a);
        RX[j] += k * S[i][j];
        RX[kQuad<T> + j] += q * S[i][j];
      }
    }
  }
  // S and z after the token.
  FWP_DEVICE void write(const StepTile<T>& tile, T (&S)[kChannels][kQuad<T>]) const {
    T u[kQuad<T>];
    FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) u[j] = load_shared(room.u(tile.column(j)));
    FWP_UNROLL for (int i = 0; i < kChannels; ++i) {
      const int d = StepTile<T>::first_channel() + i * kDown;
      if (d >= room.K) break;
      const T k = load_shared(room.k(d));
      FWP_UNROLL for (int j = 0; j < kQuad<T>; ++j) S[i][j] += k * u[j];
    }
    if (p.attention_norm) FWP_UNROLL_BY(1)
    for (int d = thread_index(); d < room.K; d += kStepThreads)
      store_shared(room.z(d), load_shared(room.z(d)) + load_shared(room.k(d)));
  }

  // Over the channels, for each column.
  FWP_DEVICE void sum(const StepTile<T>& tile, T (&RX)[2 * kQuad<T>]) const {
    FWP_UNROLL for (int r = 0; r < 2 * kQuad<T>; ++r) FWP_UNROLL for (int mask = kAcross; mask < kWarpSize; mask *= 2)
        RX[r] += shuffle_xor(RX[r], mask);
    if (lane() < kAcross)
      FWP_UNROLL for (int r = 0; r < 2 * kQuad<T>; ++r)
          store_shared(room.sums(warp(), r / kQuad<T>) + tile.column(r % kQuad<T>), RX[r]);
    sync_block();
  }

  // What is written in a column, from what was read there, and the output of the column. By the first warp.
  FWP_DEVICE void write_column(int64_t t, int64_t first, bool has_column, const Coming<T>& v,
                               const Coming<T>& beta) const {
    if (warp() != 0) return;
    T kq = dot(room.k(0), room.q(0)), R = 0, X = 0, e, u, o;
    const int column = lane() % kStepColumns<T>;
    FWP_UNROLL for (int w = 0; w < kStepWarps; ++w) {
      R += load_shared(room.sums(w, 0) + column);
      X += load_shared(room.sums(w, 1) + column);
    }
    bool blind = false;
    if (p.attention_norm) {
      const T s_sum = dot(room.z(0), room.k(0)), c_sum = gathered<true, 1>(1, dot(room.z(0), room.q(0)), &kq);
      const T eps = static_cast<T>(p.eps), scale = static_cast<T>(p.scale);
      blind = c_sum == 0;
      R = divided(R, T(1), s_sum + eps, s_sum == 0);
      X = divided(X, scale, c_sum + eps, blind);
      kq = divided(kq, scale, c_sum + eps, blind);
    }
    const T value = v.number(p.v.dtype), strength = p.beta.data ? beta.number(p.beta.dtype) : T(1);
    if (p.rule == fwp::Rule::delta)
      block_fwd<Delta, 1>(&R, &X, &kq, &value, &strength, &e, &u, &o);
    else
      block_fwd<Linear, 1>(&R, &X, &kq, &value, &strength, &e, &u, &o);
    if (lane() < kStepColumns<T>) store_shared(room.u(column), u);
    if (has_column) store_number(p.o, row_at(p.o, s, t, h) + first + column, blind ? T(0) : o);
  }

  FWP_DEVICE void run(const StepTile<T>& tile, int64_t first_column) const {
    const bool has_column = thread_index() < tile.width;
    T S[kChannels][kQuad<T>];
    tile.load(S);
    FWP_UNROLL_BY(1)
    for (int64_t t = 0; t < s.length; ++t) {
      Coming<T> v, beta;
      if (has_column) v.load(p.v, row_at(p.v, s, t, h) + first_column + thread_index());
      if (has_column && p.beta.data) beta.load(p.beta, row_at(p.beta, s, t, h));
      stage(t);
      sync_block();
      T RX[2 * kQuad<T>] = {};
      read(S, RX);
      sum(tile, RX);
      write_column(t, first_column, has_column, v, beta);
      sync_block();
      write(tile, S);
      sync_block();
    }
    tile.store(S);
  }

  FWP_DEVICE void load_z(const T* z, int64_t stride) const {
    for (int d = thread_index(); d < room.K; d += kStepThreads) store_shared(room.z(d), load_global(z + d * stride));
  }
  FWP_DEVICE void store_z(T* z, int64_t stride) const {
    for (int d = thread_index(); d < room.K; d += kStepThreads) store_global(z + d * stride, load_shared(room.z(d)));
  }
};

// Blocks at once on a multiprocessor: the more the fewer bytes each has on their way, but none that would spill.
template <class T, int kChannels>
constexpr int kStepBlocks = sizeof(T) == 8 || kChannels > 8 ? 3
                            : kChannels > 4                 ? 4
                                                            : 5;

template <class T, int kChannels>
FWP_KERNEL FWP_BOUNDS(kStepThreads, (kStepBlocks<T, kChannels>)) void step_tokens(FWP_PARAMETER Problem p,
                                                                                  FWP_PARAMETER StepShape shape) {
  const auto H = static_cast<unsigned>(p.H), blocks = static_cast<unsigned>(shape.tiles / shape.tiles_of_block);
  const unsigned index = block_index_x(), h = index / blocks % H, n = index / blocks / H;
  const int64_t slot = state_slot(p, n);
  const Step<T, kChannels> step{p, {static_cast<int>(p.K), static_cast<T*>(shared_memory())}, sequence(p, n), h};
  T* const state = static_cast<T*>(p.hT.data) + (slot == kNoSlot ? 0 : state_at(p.hT, slot, h));
  for (int64_t i = 0; i < shape.tiles_of_block; ++i) {
    const int64_t first = (index % blocks + i) * kStepColumns<T>, left = p.V - first;
    const int width = static_cast<int>(left < kStepColumns<T> ? left : kStepColumns<T>);
    if (slot == kNoSlot) {
      for (int64_t t = 0; t < step.s.length && thread_index() < width; ++t)
        store_number(p.o, row_at(p.o, step.s, t, h) + first + thread_index(), T(0));
      continue;
    }
    if (p.attention_norm) step.load_z(state + p.V, p.hT.k);
    step.run({state + first, p.hT.k, p.K, width, shape.wide}, first);
  }
  if (p.attention_norm && slot != kNoSlot) step.store_z(state + p.V, p.hT.k);
}

}  // namespace fwp::cuda::recurrent
