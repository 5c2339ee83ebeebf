// Kernels about segments: where they are, what they do to states, and the pass through them.
#pragma once

#include "rows.cuh"

namespace fwp::cuda::segments {

// The segments of all sequences, one after the other; those beyond the last are empty.
struct Table {
  int64_t N, length, count;
  int64_t* offsets;  // [count + 1] among the tokens of all batches, and then the batches [count]: Problem::cu_seqlens
  int64_t* first;    // [N + 1] of each sequence: one at least, which may be empty
};

// Of the caller's sequences. Few of them: each segment looks for its own. One block.
FWP_KERNEL void cut(FWP_PARAMETER Problem p, Table table) {
  const auto begin = [&](int64_t n) { return p.cu_seqlens != nullptr ? load_global(p.cu_seqlens + n) : n * p.T; };
  const auto segments = [&](int64_t n) {
    const int64_t tokens = begin(n + 1) - begin(n);
    return tokens > table.length ? (tokens + table.length - 1) / table.length : 1;
  };
  for (int64_t i = thread_index(); i <= table.count; i += block_threads()) {
    int64_t n = 0, first = 0;
    for (; n < p.N && i >= first + segments(n); ++n) first += segments(n);
    const bool there = n < p.N;
    store_global(table.offsets + i, there ? begin(n) + (i - first) * table.length : begin(p.N));
    if (i < table.count) store_global(table.offsets + table.count + 1 + i, there && p.cu_seqlens == nullptr ? n : 0);
  }
  for (int64_t m = thread_index(); m <= p.N; m += block_threads()) {
    int64_t first = 0;
    for (int64_t n = 0; n < m; ++n) first += segments(n);
    store_global(table.first + m, first);
  }
}

// The identity [K][K], and a row of zeros.
template <class T>
FWP_KERNEL void make_identity(int64_t K, T* identity, T* zeros) {
  const int64_t row = block_index_x();
  for (int64_t i = thread_index(); i < K; i += block_threads()) store_global(identity + row * K + i, T(i == row));
  if (row == 0)
    for (int64_t i = thread_index(); i < K; i += block_threads()) store_global(zeros + i, T(0));
}

constexpr int kDecayThreads = 128;

// A [segments][H][gates] as a diagonal: the products of the decays. p: of segments. Grid: segments * H, gates by
// the warp where they are those of channels.
template <class T>
FWP_KERNEL void multiply_decays(FWP_PARAMETER Problem p, int64_t gates, T* A) {
  const int64_t n = block_index_x() / static_cast<unsigned>(p.H), h = block_index_x() % static_cast<unsigned>(p.H);
  const Sequence s = sequence(p, n);
  const int channels = gates == 1 ? 1 : kWarpSize, parts = kDecayThreads / channels;
  const int64_t channel = int64_t{block_index_y()} * channels + thread_index() % channels;
  auto* const sums = static_cast<double*>(shared_memory());
  double sum = 0;
  for (int64_t t = thread_index() / channels; t < s.length && channel < gates; t += parts)
    sum += load_number<double>(p.g, row_at(p.g, s, t, h) + channel);
  store_shared(sums + thread_index(), sum);
  sync_block();
  if (thread_index() >= channels || channel >= gates) return;
  sum = 0;
  for (int part = 0; part < parts; ++part) sum += load_shared(sums + part * channels + thread_index());
  store_global(A + (n * p.H + h) * gates + channel, static_cast<T>(exponential(sum)));
}

constexpr int kTurn = kWarpSize;

// Matrices [K][K], turned. Grid: matrices, tiles of rows, tiles of columns; a warp.
template <class T>
FWP_KERNEL void turn(int64_t K, const T* from, T* to) {
  const int64_t at = block_index_x() * K * K, row = int64_t{block_index_y()} * kTurn,
                column = int64_t{block_index_z()} * kTurn;
  auto* const tile = static_cast<T*>(shared_memory());
  for (int i = 0; i < kTurn; ++i)
    if (row + i < K && column + lane() < K)
      store_shared(tile + i * (kTurn + 1) + lane(), load_global(from + at + (row + i) * K + column + lane()));
  sync_warp();
  for (int i = 0; i < kTurn; ++i)
    if (column + i < K && row + lane() < K)
      store_global(to + at + (column + i) * K + row + lane(), load_shared(tile + lane() * (kTurn + 1) + i));
}

// The pass through the segments, from the first (backward: the last) on.
template <class T>
struct Pass {
  Table table;
  bool backward;
  int64_t H, K, V;   // V: of states
  int64_t row;       // numbers of a row of a segment's state, V and some more
  int64_t gates;     // of a diagonal A: K, 1, or 0 where nothing decays
  const T *A, *add;  // A, of matrices what is turned; b or c
  States from;       // of sequences, where the pass begins
  T* to;             // [segments][H][K][row]: before each segment (backward: after it)
  int32_t* again;    // [N][H]: raised where these are not finite

  FWP_DEVICE int64_t first(int64_t n) const { return load_global(table.first + n + (backward ? 1 : 0)) - backward; }
  FWP_DEVICE int64_t last(int64_t n) const { return load_global(table.first + n + (backward ? 0 : 1)) - !backward; }
  FWP_DEVICE int64_t at(int64_t segment, int64_t h) const { return (segment * H + h) * K * row; }
  FWP_DEVICE T start(int64_t n, int64_t h, int64_t d, int64_t j) const {
    return from.data == nullptr ? T(0)
                                : load_global(static_cast<const T*>(from.data) + state_at(from, n, h) + d * from.k + j);
  }
  FWP_DEVICE void put(int64_t segment, int64_t n, int64_t h, int64_t d, int64_t j, T x) const {
    store_global(to + at(segment, h) + d * row + j, x);
    if (!(x - x == 0)) raise(again + n * H + h);
  }
  // Segments beyond the last have states of zeros.
  FWP_DEVICE void clear_rest(int64_t n, int64_t h, int64_t d, int64_t j) const {
    if (n + 1 < table.N) return;
    for (int64_t i = load_global(table.first + table.N); i < table.count; ++i)
      store_global(to + at(i, h) + d * row + j, T(0));
  }
};

constexpr int kPassThreads = 256;

// Where A is diagonal a thread has one number of the state. Grid: N * H, numbers of a state.
template <class T>
FWP_KERNEL void pass_diagonals(FWP_PARAMETER Pass<T> x) {
  const int64_t n = block_index_x() / static_cast<unsigned>(x.H), h = block_index_x() % static_cast<unsigned>(x.H);
  const int64_t number = int64_t{block_index_y()} * kPassThreads + thread_index(), d = number / x.V, j = number % x.V;
  if (d >= x.K) return;
  const int64_t last = x.last(n), step = x.backward ? -1 : 1;
  T S = x.start(n, h, d, j);
  for (int64_t i = x.first(n);; i += step) {
    x.put(i, n, h, d, j, S);
    if (i == last) break;
    const T A = x.gates == 0 ? T(1) : load_global(x.A + (i * x.H + h) * x.gates + (x.gates == 1 ? 0 : d));
    S = A * S + load_global(x.add + x.at(i, h) + d * x.row + j);
  }
  x.clear_rest(n, h, d, j);
}

constexpr int kPassColumns = 8;
constexpr int kMostMatrixThreads = 512;

// A block's threads: some rows, the sums of each in some parts. Their order depends on K alone.
struct MatrixThreads {
  int rows, parts;

  static constexpr MatrixThreads of(int64_t K) {
    constexpr int kFewestNumbers = 8;  // of a part
    const int most =
        K < kMostMatrixThreads ? static_cast<int>((K + kWarpSize - 1) / kWarpSize) * kWarpSize : kMostMatrixThreads;
    const int parts = static_cast<int>((K + kFewestNumbers - 1) / kFewestNumbers);
    return {most, parts < kMostMatrixThreads / most ? parts : kMostMatrixThreads / most};
  }
  constexpr int threads() const { return rows * parts; }
  constexpr int sums() const { return threads() + 4; }  // of a column in shared memory; no bank conflicts
};

// Where A is a matrix a thread has a row of 8 columns, or a part of the sums of that row. Grid: N * H, columns.
template <class T>
FWP_KERNEL void pass_matrices(FWP_PARAMETER Pass<T> x) {
  constexpr int C = kPassColumns;
  const int64_t n = block_index_x() / static_cast<unsigned>(x.H), h = block_index_x() % static_cast<unsigned>(x.H);
  const int64_t column = int64_t{block_index_y()} * C, K = x.K;
  const int columns = static_cast<int>(x.V - column < C ? x.V - column : C);
  const auto threads = MatrixThreads::of(K);
  const int rows = threads.rows, parts = threads.parts, part = thread_index() / rows;
  const int64_t begin = K * part / parts, end = K * (part + 1) / parts;
  auto* const sums = static_cast<T*>(shared_memory());  // [C][parts][rows]
  const auto each = [&](int64_t numbers, const auto& f) {
    for (int64_t m = thread_index(); m < numbers * C; m += threads.threads())
      if (m % C < columns) f(m / C, static_cast<int>(m % C));
  };

  const int64_t last = x.last(n), step = x.backward ? -1 : 1;
  int64_t i = x.first(n);
  each(K, [&](int64_t d, int j) { x.put(i, n, h, d, column + j, x.start(n, h, d, column + j)); });
  for (; i != last; i += step) {
    sync_block();  // the state is there
    const T* const S = x.to + x.at(i, h) + column;
    const T* const A = x.A + (i * x.H + h) * K * K;
    for (int64_t first = 0; first < K; first += rows) {
      const int64_t d = first + thread_index() % rows;
      T sum[C] = {};
      if (d < K) {
        FWP_UNROLL_BY(8)
        for (int64_t k = begin; k < end; ++k) {
          const T a = load_global(A + k * K + d);
          FWP_UNROLL for (int j = 0; j < C; j += kQuad<T>) {
            const auto some = load_global(reinterpret_cast<const Numbers<T>*>(S + k * x.row + j));
            FWP_UNROLL for (int l = 0; l < kQuad<T>; ++l) sum[j + l] += a * some.x[l];
          }
        }
        FWP_UNROLL for (int j = 0; j < C; ++j) store_shared(sums + j * threads.sums() + thread_index(), sum[j]);
      }
      sync_block();
      each(K - first < rows ? K - first : rows, [&](int64_t r, int j) {
        T all = load_shared(sums + j * threads.sums() + r);
        for (int other = 1; other < parts; ++other) all += load_shared(sums + j * threads.sums() + other * rows + r);
        all += load_global(x.add + x.at(i, h) + (first + r) * x.row + column + j);
        x.put(i + step, n, h, first + r, column + j, all);
      });
      sync_block();  // before the sums are written again
    }
  }
  each(K, [&](int64_t d, int j) { x.clear_rest(n, h, d, column + j); });
}

// States of sequences from those of segments, their first or last. Grid: N * H, numbers of a state.
template <class T>
FWP_KERNEL void hand_over(Table table, bool of_last, int64_t H, int64_t K, int64_t V, int64_t row, const T* from,
                          States to) {
  const int64_t n = block_index_x() / static_cast<unsigned>(H), h = block_index_x() % static_cast<unsigned>(H);
  const int64_t number = int64_t{block_index_y()} * kPassThreads + thread_index(), d = number / V, j = number % V;
  if (d >= K) return;
  const int64_t segment = of_last ? load_global(table.first + n + 1) - 1 : load_global(table.first + n);
  store_global(static_cast<T*>(to.data) + state_at(to, n, h) + d * to.k + j,
               load_global(from + ((segment * H + h) * K + d) * row + j));
}

}  // namespace fwp::cuda::segments
