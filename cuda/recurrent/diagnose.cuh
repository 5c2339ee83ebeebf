// Probes of a fast weight at work (fwp.h): the recurrence token by token. A block of threads for each head takes the
// tiles of value columns one after the other, and adds what they have to the probes of every token.
#pragma once

#include "block.cuh"

namespace fwp::cuda::recurrent {

constexpr int kDiagnoseThreads = 128;
constexpr int kDiagnoseWarps = kDiagnoseThreads / kWarpSize;

// Keys and queries are without scale. `columns` of a tile are a power of two, up to a warp's; a thread has one of them,
// in every groups()-th channel.
template <class T>
struct Diagnosis {
  const Problem& p;
  Sequence s;
  int64_t h;
  int K, columns;
  T* base;

  FWP_DEVICE T* k(int d) const { return base + d; }
  FWP_DEVICE T* q(int d) const { return base + K + d; }
  FWP_DEVICE T* a(int d) const { return base + 2 * K + d; }
  FWP_DEVICE T* z(int d) const { return base + 3 * K + d; }
  FWP_DEVICE T* part(int of_thread) const { return base + 4 * K + of_thread; }
  FWP_DEVICE T* u(int column) const { return part(kDiagnoseThreads) + column; }
  FWP_DEVICE T* S(int d) const { return u(columns) + d * columns + column(); }
  static int64_t numbers(int64_t K, int columns) { return (4 + columns) * K + kDiagnoseThreads + columns; }

  FWP_DEVICE int groups() const { return kDiagnoseThreads / columns; }
  FWP_DEVICE int column() const { return thread_index() % columns; }
  template <class F>
  FWP_DEVICE void for_channels(const F& f) const {
    for (int d = thread_index() / columns; d < K; d += groups()) f(d);
  }
  template <class F>
  FWP_DEVICE void for_rows(const F& f) const {
    for (int d = thread_index(); d < K; d += kDiagnoseThreads) f(d);
  }

  FWP_DEVICE static T sum_lanes(T x) {
    FWP_UNROLL for (int mask = 1; mask < kWarpSize; mask *= 2) x += shuffle_xor(x, mask);
    return x;
  }
  // Of f(d) over the channels, in every lane of every warp.
  template <class F>
  FWP_DEVICE T sum(const F& f) const {
    T x = 0;
    for (int d = lane(); d < K; d += kWarpSize) x += f(d);
    return sum_lanes(x);
  }

  FWP_DEVICE void load(int64_t slot, int64_t first, bool there) const {
    const T* const state = p.h0.data ? static_cast<const T*>(p.h0.data) + state_at(p.h0, slot, h) : nullptr;
    for_channels([&](int d) {
      store_shared(S(d), state != nullptr && there ? load_global(state + d * p.h0.k + first + column()) : T(0));
    });
    for_rows([&](int d) {
      store_shared(z(d), state != nullptr && p.attention_norm ? load_global(state + d * p.h0.k + p.V) : T(0));
    });
  }

  FWP_DEVICE void stage(int64_t t) const {
    const int64_t k_at = row_at(p.k, s, t, h), q_at = row_at(p.q, s, t, h);
    for_rows([&](int d) {
      T gate = 0;
      if (p.decay != fwp::Decay::none)
        gate = load_number<T>(p.g, row_at(p.g, s, t, h) + (p.decay == fwp::Decay::channel ? d : 0));
      const T decay = resets(gate) ? T(-1) : exponential(gate);
      store_shared(k(d), load_number<T>(p.k, k_at + d));
      store_shared(q(d), load_number<T>(p.q, q_at + d));
      store_shared(a(d), decay);
      store_shared(z(d), decayed(load_shared(z(d)), decay));
    });
    sync_block();
  }

  // What a read of the key is divided by.
  FWP_DEVICE T normalised(T read, T by) const {
    return p.attention_norm ? divided(read, T(1), by + static_cast<T>(p.eps), by == 0) : read;
  }

  // The probes of keys and of z after the write, which value columns have no part in.
  FWP_DEVICE void probe_keys(T keys, T before, T* out) const {
    const auto next = [&](int d) { return load_shared(z(d)) + load_shared(k(d)); };
    T most = K > 0 ? next(0) : T(0), stalled = 0;
    for (int d = lane(); d < K; d += kWarpSize) {
      most = next(d) > most ? next(d) : most;
      stalled += load_shared(k(d)) != 0 && next(d) == load_shared(z(d)) ? T(1) : T(0);
    }
    FWP_UNROLL for (int mask = 1; mask < kWarpSize; mask *= 2) {
      const T other = shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    const T numbers[kProbes - 6] = {keys,
                                    sum([&](int d) { return load_shared(k(d)); }),
                                    before,
                                    sum([&](int d) { return next(d) * load_shared(q(d)); }),
                                    sum([&](int d) { return next(d) < 0 ? -next(d) : next(d); }),
                                    most,
                                    sum_lanes(stalled)};
    FWP_UNROLL for (int i = 0; i < kProbes - 6; ++i) if (thread_index() == 0) store_global(out + 6 + i, numbers[i]);
  }

  // One token on one tile.
  FWP_DEVICE void probe(int64_t t, int64_t first, bool there) const {
    T* const out = static_cast<T*>(p.o.data) + row_at(p.o, s, t, h);
    const T keys = sum([&](int d) { return load_shared(k(d)) * load_shared(k(d)); });
    const T before = sum([&](int d) { return load_shared(z(d)) * load_shared(k(d)); });
    if (first == 0 && warp() == 0) probe_keys(keys, before, out);

    T raw = 0;
    for_channels([&](int d) {
      const T x = decayed(load_shared(S(d)), load_shared(a(d)));
      store_shared(S(d), x);
      raw += load_shared(k(d)) * x;
    });
    store_shared(part(thread_index()), raw);
    sync_block();
    T sums[6] = {};
    if (warp() == 0) {
      raw = 0;
      for (int group = 0; group < groups(); ++group) raw += load_shared(part(group * columns + column()));
      const T v = there ? load_number<T>(p.v, row_at(p.v, s, t, h) + first + column()) : T(0);
      const T beta = p.beta.data ? load_number<T>(p.beta, row_at(p.beta, s, t, h)) : T(1);
      const T read = normalised(raw, before), written = beta * (p.rule == fwp::Rule::delta ? v - read : v);
      const T left = v - normalised(raw + keys * written, before + keys), e = v - read;
      if (thread_index() < columns) store_shared(u(column()), written);
      const bool mine = there && thread_index() < columns;
      const T numbers[5] = {v * v, read * read, v * read, e * e, left * left};
      FWP_UNROLL for (int i = 0; i < 5; ++i) sums[i] = sum_lanes(mine ? numbers[i] : T(0));
    }
    sync_block();
    T norm = 0;
    for_channels([&](int d) {
      const T x = load_shared(S(d)) + load_shared(k(d)) * load_shared(u(column()));
      store_shared(S(d), x);
      if (there) norm += x * x;
    });
    norm = sum_lanes(norm);
    if (lane() == 0) store_shared(part(warp()), norm);
    for_rows([&](int d) { store_shared(z(d), load_shared(z(d)) + load_shared(k(d))); });
    sync_block();
    if (thread_index() != 0) return;
    for (int w = 0; w < kDiagnoseWarps; ++w) sums[5] += load_shared(part(w));
    FWP_UNROLL for (int i = 0; i < 6; ++i) store_global(out + i, first == 0 ? sums[i] : load_global(out + i) + sums[i]);
  }
};

template <class T>
FWP_KERNEL void probe_tokens(FWP_PARAMETER Problem p, int columns) {
  const auto H = static_cast<unsigned>(p.H);
  const unsigned h = block_index_x() % H, n = block_index_x() / H;
  const Diagnosis<T> d{p, sequence(p, n), h, static_cast<int>(p.K), columns, static_cast<T*>(shared_memory())};
  for (int64_t first = 0; first == 0 || first < p.V; first += columns) {
    const bool there = first + d.column() < p.V;
    d.load(n, first, there);
    for (int64_t t = 0; t < d.s.length; ++t) {
      sync_block();
      d.stage(t);
      d.probe(t, first, there);
    }
    sync_block();
  }
}

}  // namespace fwp::cuda::recurrent
