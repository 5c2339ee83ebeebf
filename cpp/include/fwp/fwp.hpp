// fwp.hpp: the C++ interface of fwp_core, header-only over fwp.h. Errors are exceptions, tensors are views of memory
// that the caller owns. Equations, shapes and promises are those of fwp.h.
//
//   const int64_t B = 1, T = 128, H = 4, K = 64, V = 64;
//   std::vector<float> q(B * T * H * K), k(q.size()), v(B * T * H * V), beta(B * T * H), o(v.size()), S(B * H * K * V);
//   // ... fill q, k, v, beta ...
//   fwp::inputs in;
//   in.q = {q.data(), {B, T, H, K}};
//   in.k = {k.data(), {B, T, H, K}};
//   in.v = {v.data(), {B, T, H, V}};
//   in.beta = {beta.data(), {B, T, H}};
//   fwp::delta_fwd(in, {{o.data(), {B, T, H, V}}, {S.data(), {B, H, K, V}}});
//
// Every function throws fwp::Error with the code and message of fwp.h, before anything is computed or written.
#ifndef FWP_HPP
#define FWP_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "fwp.h"

namespace fwp {

class Error : public std::runtime_error {
 public:
  Error(int code, const char* message) : std::runtime_error(message), code_(code) {}
  int code() const noexcept { return code_; }  // FWP_SHAPE_ERROR, ...

 private:
  int code_;
};

inline void check(int status) {
  if (status != FWP_OK) throw Error(status, fwp_last_error());
}

// Half-precision numbers as their bits. A pointer to those of a compiler or another library is cast to a pointer to
// these.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// A tensor of float, double, float16, bfloat16, int32_t or int64_t in the caller's memory; strides count elements and
// default to compact row-major. A default view is an absent tensor. Views of inputs may be made from const pointers.
class view {
 public:
  view() = default;

  template <class T>
  view(T* data, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides = {}) : present_(true) {
    using Item = std::remove_const_t<T>;
    constexpr bool is_integer = std::is_same_v<Item, int32_t> || std::is_same_v<Item, int64_t>;
    constexpr bool is_bfloat = std::is_same_v<Item, bfloat16>;
    static_assert(is_integer || is_bfloat || std::is_same_v<Item, float16> || std::is_same_v<Item, float> ||
                      std::is_same_v<Item, double>,
                  "fwp::view holds float, double, float16, bfloat16, int32_t or int64_t");
    if (shape.size() > shape_.size()) throw Error(FWP_SHAPE_ERROR, "view: expected at most 4 axes");
    if (strides.size() != 0 && strides.size() != shape.size())
      throw Error(FWP_SHAPE_ERROR, "view: expected as many strides as axes");
    std::copy(shape.begin(), shape.end(), shape_.begin());
    std::copy(strides.begin(), strides.end(), strides_.begin());
    strided_ = strides.size() != 0;
    tensor_.data = const_cast<Item*>(data);
    tensor_.device = {kDLCPU, 0};
    tensor_.ndim = static_cast<int32_t>(shape.size());
    tensor_.dtype = {uint8_t{is_integer ? kDLInt : is_bfloat ? kDLBfloat : kDLFloat}, 8 * sizeof(Item), 1};
  }

  bool present() const noexcept { return present_; }

  // The same, of memory on a CUDA device.
  view cuda(int device = 0) const noexcept {
    view there = *this;
    there.tensor_.device = {kDLCUDA, device};
    return there;
  }

  // Points into this view.
  DLTensor tensor() const noexcept {
    DLTensor tensor = tensor_;
    tensor.shape = const_cast<int64_t*>(shape_.data());
    tensor.strides = strided_ ? const_cast<int64_t*>(strides_.data()) : nullptr;
    return tensor;
  }

 private:
  DLTensor tensor_{};
  std::array<int64_t, 4> shape_{}, strides_{};
  bool present_ = false, strided_ = false;
};

// A feature map of fwp.h: its kind FWP_MAP_..., and what that map needs.
struct feature_map {
  int kind = 0;  // none
  int nu = 1;
  double eps = 0;
  view projection{};
};
struct options {
  double scale = 1;
  int (*interrupt)(void* data) = nullptr;  // polled every few milliseconds; non-zero stops the call
  void* interrupt_data = nullptr;
  fwp::feature_map feature_map{};
  int qk_norm = FWP_NORM_NONE;
  bool attention_norm = false;
  double eps = 1e-6;
  void* stream = nullptr;  // cudaStream_t that work on tensors of a device is put on
};
struct inputs {
  view q{}, k{}, v{}, beta{}, g{}, h0{}, cu_seqlens{}, state_indices{};
};
struct outputs {
  view o{}, hT{}, checkpoints{};
};
struct cotangents {
  view d_o{}, d_hT{}, checkpoints{};
};
struct gradients {
  view dq{}, dk{}, dv{}, dbeta{}, dg{}, dh0{};
};
// Scratch memory aligned to 64 bytes, of the size that the *_workspace function returns, where the tensors are; by
// default the library's own.
struct workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

namespace detail {

// The DLTensor of a view, NULL for an absent one.
class pointer {
 public:
  explicit pointer(const view& v) : tensor_(v.tensor()), present_(v.present()) {}
  const DLTensor* get() const noexcept { return present_ ? &tensor_ : nullptr; }

 private:
  DLTensor tensor_;
  bool present_;
};

// The C form of a feature map, and of options.
class c_map {
 public:
  explicit c_map(const feature_map& map)
      : projection_(map.projection), map_{sizeof(fwp_feature_map), map.kind, map.nu, map.eps, projection_.get()} {}
  c_map(const c_map&) = delete;  // map_ points into this object
  c_map& operator=(const c_map&) = delete;
  const fwp_feature_map* get() const noexcept { return map_.kind != 0 ? &map_ : nullptr; }

 private:
  pointer projection_;
  fwp_feature_map map_;
};

class c_options {
 public:
  explicit c_options(const options& options)
      : map_(options.feature_map),
        options_{sizeof(fwp_options),
                 options.scale,
                 options.interrupt,
                 options.interrupt_data,
                 map_.get(),
                 options.qk_norm,
                 options.attention_norm ? 1 : 0,
                 options.eps,
                 0,
                 0} {}
  const fwp_options* get() const noexcept { return &options_; }

 private:
  c_map map_;
  fwp_options options_;
};

// Calls fn with the C form of the inputs.
template <class Fn>
void with_inputs(const inputs& in, const Fn& fn) {
  const pointer q(in.q), k(in.k), v(in.v), beta(in.beta), g(in.g), h0(in.h0), cu_seqlens(in.cu_seqlens);
  const pointer state_indices(in.state_indices);
  const fwp_inputs inputs{sizeof(fwp_inputs), q.get(), k.get(),  v.get(),
                          beta.get(),         g.get(), h0.get(), cu_seqlens.get(),
                          state_indices.get()};
  check(fn(&inputs));
}

template <class Forward>
void fwd(Forward* forward, const inputs& in, const outputs& out, const options& options, workspace scratch) {
  const pointer o(out.o), hT(out.hT), checkpoints(out.checkpoints);
  const fwp_outputs outputs{sizeof(fwp_outputs), o.get(), hT.get(), checkpoints.get()};
  const c_options settings(options);
  with_inputs(in, [&](const fwp_inputs* inputs) {
    return forward(settings.get(), inputs, &outputs, scratch.data, scratch.bytes, options.stream);
  });
}

template <class Backward>
void bwd(Backward* backward, const inputs& in, const cotangents& from, const gradients& to, const options& options,
         workspace scratch) {
  const pointer d_o(from.d_o), d_hT(from.d_hT), checkpoints(from.checkpoints);
  const fwp_cotangents cotangents{sizeof(fwp_cotangents), d_o.get(), d_hT.get(), checkpoints.get()};
  const pointer dq(to.dq), dk(to.dk), dv(to.dv), dbeta(to.dbeta), dg(to.dg), dh0(to.dh0);
  const fwp_gradients gradients{sizeof(fwp_gradients), dq.get(), dk.get(), dv.get(), dbeta.get(), dg.get(), dh0.get()};
  const c_options settings(options);
  with_inputs(in, [&](const fwp_inputs* inputs) {
    return backward(settings.get(), inputs, &cotangents, &gradients, scratch.data, scratch.bytes, options.stream);
  });
}

template <class Step>
void step(Step* function, const inputs& in, const view& state, const view& o, const options& options,
          workspace scratch) {
  const pointer S(state), out(o);
  const c_options settings(options);
  with_inputs(in, [&](const fwp_inputs* inputs) {
    return function(settings.get(), inputs, S.get(), out.get(), scratch.data, scratch.bytes, options.stream);
  });
}

template <class Diagnose>
void diagnose(Diagnose* function, const inputs& in, const view& probes, const options& options, workspace scratch) {
  const pointer out(probes);
  const c_options settings(options);
  with_inputs(in, [&](const fwp_inputs* inputs) {
    return function(settings.get(), inputs, out.get(), scratch.data, scratch.bytes, options.stream);
  });
}

template <class Number, class Query>
Number ask(Query* query, const inputs& in, const options& options) {
  Number answer = 0;
  const c_options settings(options);
  with_inputs(in, [&](const fwp_inputs* inputs) { return query(settings.get(), inputs, &answer); });
  return answer;
}

}  // namespace detail

// ---- scans ----

inline void linear_fwd(const inputs& in, const outputs& out, const options& options = {}, workspace scratch = {}) {
  detail::fwd(fwp_linear_fwd, in, out, options, scratch);
}
inline void delta_fwd(const inputs& in, const outputs& out, const options& options = {}, workspace scratch = {}) {
  detail::fwd(fwp_delta_fwd, in, out, options, scratch);
}

// Exact gradients of sum(o * d_o) + sum(hT * d_hT). They are overwritten; absent ones are not stored.
inline void linear_bwd(const inputs& in, const cotangents& from, const gradients& to, const options& options = {},
                       workspace scratch = {}) {
  detail::bwd(fwp_linear_bwd, in, from, to, options, scratch);
}
inline void delta_bwd(const inputs& in, const cotangents& from, const gradients& to, const options& options = {},
                      workspace scratch = {}) {
  detail::bwd(fwp_delta_bwd, in, from, to, options, scratch);
}

// Decoding: one token, the inputs and o without their T axis, or a few, with it. state [B,H,K,V], or [S,H,K,V] with
// state_indices, is updated in place.
inline void linear_step(const inputs& in, const view& state, const view& o, const options& options = {},
                        workspace scratch = {}) {
  detail::step(fwp_linear_step, in, state, o, options, scratch);
}
inline void delta_step(const inputs& in, const view& state, const view& o, const options& options = {},
                       workspace scratch = {}) {
  detail::step(fwp_delta_step, in, state, o, options, scratch);
}

// Probes of a scan, [B,T,H,FWP_PROBES] of the states' dtype, named in fwp.h.
inline void linear_diagnose(const inputs& in, const view& probes, const options& options = {}, workspace scratch = {}) {
  detail::diagnose(fwp_linear_diagnose, in, probes, options, scratch);
}
inline void delta_diagnose(const inputs& in, const view& probes, const options& options = {}, workspace scratch = {}) {
  detail::diagnose(fwp_delta_diagnose, in, probes, options, scratch);
}

// ---- sizes ----

// Elements of the 1-d checkpoints tensor, of the state's dtype.
inline int64_t checkpoints(const inputs& in, const options& options = {}) {
  return detail::ask<int64_t>(fwp_checkpoints, in, options);
}

// Bytes of workspace, with the current number of threads and instruction set.
inline size_t linear_fwd_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_linear_fwd_workspace, in, options);
}
inline size_t delta_fwd_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_delta_fwd_workspace, in, options);
}
inline size_t linear_bwd_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_linear_bwd_workspace, in, options);
}
inline size_t delta_bwd_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_delta_bwd_workspace, in, options);
}
inline size_t linear_diagnose_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_linear_diagnose_workspace, in, options);
}
inline size_t delta_diagnose_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_delta_diagnose_workspace, in, options);
}
inline size_t linear_step_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_linear_step_workspace, in, options);
}
inline size_t delta_step_workspace(const inputs& in, const options& options = {}) {
  return detail::ask<size_t>(fwp_delta_step_workspace, in, options);
}

// ---- feature maps alone ----

inline int64_t feature_size(const feature_map& map, int64_t n) {
  int64_t size = 0;
  check(fwp_feature_size(detail::c_map(map).get(), n, &size));
  return size;
}
// y [M,K] = phi(x [M,n]), and d_x from d_y.
inline void feature_map_fwd(const feature_map& map, const view& x, const view& y, void* stream = nullptr) {
  const detail::pointer in(x), out(y);
  check(fwp_feature_map_fwd(detail::c_map(map).get(), in.get(), out.get(), stream));
}
inline void feature_map_bwd(const feature_map& map, const view& d_y, const view& x, const view& d_x,
                            void* stream = nullptr) {
  const detail::pointer dy(d_y), in(x), dx(d_x);
  check(fwp_feature_map_bwd(detail::c_map(map).get(), dy.get(), in.get(), dx.get(), stream));
}

// ---- library ----

inline void set_num_threads(int threads) { check(fwp_set_num_threads(threads)); }
inline int get_num_threads() { return fwp_get_num_threads(); }
inline void use_isa(const char* name) { check(fwp_use_isa(name)); }
inline const char* isa() { return fwp_isa(); }  // NULL if FWP_ISA names no level of this machine

}  // namespace fwp

#endif  // FWP_HPP
