// The scans. Each function reads its arrays, makes the results, and calls fwp.h without the GIL.
#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <iterator>
#include <string>

#include "arrays.hpp"
#include "bind.hpp"
#include "errors.hpp"
#include "features.hpp"
#include "fwp/fwp.h"

namespace py = pybind11;

namespace fwp::python {
namespace {

struct Rule {
  bool needs_beta;
  decltype(&fwp_delta_fwd) fwd;
  decltype(&fwp_delta_bwd) bwd;
  decltype(&fwp_delta_step) step;
  decltype(&fwp_delta_diagnose) diagnose;
  decltype(&fwp_delta_fwd_workspace) fwd_workspace, bwd_workspace, step_workspace, diagnose_workspace;
};

constexpr Rule kLinear{false,
                       fwp_linear_fwd,
                       fwp_linear_bwd,
                       fwp_linear_step,
                       fwp_linear_diagnose,
                       fwp_linear_fwd_workspace,
                       fwp_linear_bwd_workspace,
                       fwp_linear_step_workspace,
                       fwp_linear_diagnose_workspace};
constexpr Rule kDelta{true,
                      fwp_delta_fwd,
                      fwp_delta_bwd,
                      fwp_delta_step,
                      fwp_delta_diagnose,
                      fwp_delta_fwd_workspace,
                      fwp_delta_bwd_workspace,
                      fwp_delta_step_workspace,
                      fwp_delta_diagnose_workspace};

// The arrays that every call reads.
struct Inputs {
  Array q, k, v, beta, g, h0, cu_seqlens, state_indices;

  Inputs(const Rule& rule, py::handle q_, py::handle k_, py::handle v_, py::handle beta_, py::handle g_) {
    q.read("q", q_);
    k.read("k", k_, &q);
    v.read("v", v_, &q);
    rule.needs_beta ? beta.read("beta", beta_, &q) : beta.read_optional("beta", beta_, &q);
    g.read_optional("g", g_, &q);
  }

  fwp_inputs tensors() const {
    return {sizeof(fwp_inputs), q.tensor(),          k.tensor(),
            v.tensor(),         beta.tensor(),       g.tensor(),
            h0.tensor(),        cu_seqlens.tensor(), state_indices.tensor()};
  }

  // The sizes of results, once the inputs have been checked.
  int64_t heads() const {
    const int axis = v.rank() - 2;
    return std::max({q.size(axis), k.size(axis), v.size(axis)});
  }
  // States are as precise as the sums that make them.
  DLDataType state_dtype() const { return v.dtype().bits == 64 ? v.dtype() : DLDataType{kDLFloat, 32, 1}; }
  int64_t sequences() const { return cu_seqlens.present() ? cu_seqlens.size(0) - 1 : v.size(0); }

  std::array<Array*, 8> arrays() { return {&q, &k, &v, &beta, &g, &h0, &cu_seqlens, &state_indices}; }
};

// Memory for the work of a call on a device, of the caller's framework where that can be asked for it; else none, and
// the library has its own.
class Workspace {
 public:
  Workspace(decltype(Rule::fwd_workspace) query, const fwp_options& options, const Inputs& in) {
    if (!in.q.allocates()) return;
    const fwp_inputs inputs = in.tensors();
    check_scan(query(&options, &inputs, &bytes_));
    if (bytes_ != 0) memory_.make_scratch(in.q, static_cast<int64_t>(bytes_ + kAlignment));
  }

  void* data() const {
    if (!memory_.present()) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(memory_.tensor()->data);
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 64;  // that fwp.h wants; frameworks promise none

  Array memory_;
  size_t bytes_ = 0;
};

double number(const char* name, py::handle object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError) != 0) {
      PyErr_Clear();
      raise(FWP_ARGUMENT_ERROR, std::string(name) + ": expected a number in the range of float64, got a larger one");
    }
    clear_type_error();
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected a number, got " + Py_TYPE(object.ptr())->tp_name);
  }
  return value;
}

// Lets Python's signal handlers run; true (-1) if one raised.
int poll_signals(void*) {
  const PyGILState_STATE gil = PyGILState_Ensure();
  const int raised = PyErr_CheckSignals();
  PyGILState_Release(gil);
  return raised;
}

// Signal handlers run on the main thread only.
bool on_main_thread() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> main_thread;
  main_thread.call_once_and_store_result([] { return py::module_::import("threading").attr("main_thread"); });
  return main_thread.get_stored()().attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

int qk_norm_of(py::handle object) {
  if (object.is_none()) return FWP_NORM_NONE;
  if (PyUnicode_Check(object.ptr()) == 0)
    raise(FWP_DTYPE_ERROR, std::string("qk_norm: expected None, 'sum' or 'l2', got ") + Py_TYPE(object.ptr())->tp_name);
  if (PyUnicode_CompareWithASCIIString(object.ptr(), "sum") == 0) return FWP_NORM_SUM;
  if (PyUnicode_CompareWithASCIIString(object.ptr(), "l2") == 0) return FWP_NORM_L2;
  raise(FWP_ARGUMENT_ERROR, "qk_norm: expected None, 'sum' or 'l2', got " +
                                std::string(py::repr(py::reinterpret_borrow<py::object>(object))));
}

// The options of a call as its caller gives them.
struct OptionArgs {
  py::handle feature_map, qk_norm, attention_norm, eps, scale;

  fwp_options read(const Inputs& in, bool interruptible) const {
    fwp_options options = read(interruptible);
    if (const FeatureMap* const map = python::feature_map(feature_map)) map->check_memory(in.q);
    options.check_only = in.q.abstract() ? 1 : 0;
    return options;
  }

  fwp_options read(bool interruptible) const {
    fwp_options options FWP_OPTIONS_INIT;
    options.scale = number("scale", scale);
    options.interrupt = interruptible && on_main_thread() ? poll_signals : nullptr;
    if (const FeatureMap* const map = python::feature_map(feature_map)) options.feature_map = map->tensors();
    options.qk_norm = qk_norm_of(qk_norm);
    if (PyBool_Check(attention_norm.ptr()) == 0)
      raise(FWP_DTYPE_ERROR,
            std::string("attention_norm: expected True or False, got ") + Py_TYPE(attention_norm.ptr())->tp_name);
    options.attention_norm = attention_norm.ptr() == Py_True ? 1 : 0;
    options.eps = number("eps", eps);
    return options;
  }
};

// Sizes of a state's last axes.
struct StateShape {
  int64_t K, columns;

  StateShape(const fwp_options& options, const Array& q, const Array& v)
      : K(q.size(q.rank() - 1)), columns(v.size(v.rank() - 1) + options.attention_norm) {
    if (options.feature_map != nullptr) check_scan(fwp_feature_size(options.feature_map, K, &K));
  }
};

// Checks the inputs of a scan, before any result is made; returns the number of elements of its checkpoints.
int64_t check_inputs(const Inputs& in, const fwp_options& options) {
  const fwp_inputs inputs = in.tensors();
  int64_t checkpoints = 0;
  check_scan(fwp_checkpoints(&options, &inputs, &checkpoints));
  return checkpoints;
}

// Calls fwp.h. Where all is right but for a strided last axis, calls again with copies of such arrays: the first call
// has then checked the caller's own memory, overlaps included.
template <class Call>
void run(const Call& call, Inputs& inputs, std::initializer_list<Array*> others) {
  int status = without_gil(call);
  if (status == FWP_UNSUPPORTED_ERROR) {
    bool copied = false;
    for (Array* array : inputs.arrays()) copied |= array->make_contiguous();
    for (Array* array : others) copied |= array->make_contiguous();
    if (copied) status = without_gil(call);
  }
  check_scan(status);
  for (Array* array : others) array->copy_back();
}

// Returns (o, final_state, checkpoints), the last None unless asked for.
template <const Rule& rule>
py::tuple forward(py::handle q, py::handle k, py::handle v, py::handle beta, py::handle g, py::handle feature_map,
                  py::handle qk_norm, py::handle attention_norm, py::handle eps, py::handle scale,
                  py::handle initial_state, py::handle cu_seqlens, py::handle out, py::handle final_state_out,
                  bool with_checkpoints) {
  Inputs in(rule, q, k, v, beta, g);
  in.h0.read_optional("initial_state", initial_state, &in.q);
  in.cu_seqlens.read_integers("cu_seqlens", cu_seqlens, &in.q);
  const fwp_options options = OptionArgs{feature_map, qk_norm, attention_norm, eps, scale}.read(in, true);

  const int64_t elements = check_inputs(in, options);

  const DLDataType dtype = in.v.dtype(), state_dtype = in.state_dtype();
  Array o, final_state, checkpoints;
  o.write_optional("out", out, &in.q);
  final_state.write_optional("final_state_out", final_state_out, &in.q);
  if (!o.present()) o.make(in.q, {in.v.size(0), in.v.size(1), in.heads(), in.v.size(3)}, dtype);
  if (!final_state.present()) {
    const StateShape state(options, in.q, in.v);
    final_state.make(in.q, {in.sequences(), in.heads(), state.K, state.columns}, state_dtype);
  }
  if (with_checkpoints) checkpoints.make(in.q, {elements}, state_dtype);
  const Workspace workspace(rule.fwd_workspace, options, in);
  const auto call = [&] {
    const fwp_inputs inputs = in.tensors();
    const fwp_outputs outputs{sizeof outputs, o.tensor(), final_state.tensor(), checkpoints.tensor()};
    return rule.fwd(&options, &inputs, &outputs, workspace.data(), workspace.bytes(), in.q.stream());
  };
  run(call, in, {&o, &final_state});
  return py::make_tuple(o.object(), final_state.object(), checkpoints.object());
}

// Returns the probes [B,T,H,FWP_PROBES].
template <const Rule& rule>
py::object diagnose(py::handle q, py::handle k, py::handle v, py::handle beta, py::handle g, py::handle feature_map,
                    py::handle qk_norm, py::handle attention_norm, py::handle eps, py::handle scale,
                    py::handle initial_state, py::handle cu_seqlens) {
  Inputs in(rule, q, k, v, beta, g);
  in.h0.read_optional("initial_state", initial_state, &in.q);
  in.cu_seqlens.read_integers("cu_seqlens", cu_seqlens, &in.q);
  const fwp_options options = OptionArgs{feature_map, qk_norm, attention_norm, eps, scale}.read(in, true);
  check_inputs(in, options);
  Array probes;
  probes.make(in.q, {in.v.size(0), in.v.size(1), in.heads(), FWP_PROBES}, in.state_dtype());
  const Workspace workspace(rule.diagnose_workspace, options, in);
  const auto call = [&] {
    const fwp_inputs inputs = in.tensors();
    return rule.diagnose(&options, &inputs, probes.tensor(), workspace.data(), workspace.bytes(), in.q.stream());
  };
  run(call, in, {&probes});
  return probes.object();
}

constexpr const char* kGradients[] = {"out.dq", "out.dk", "out.dv", "out.dbeta", "out.dg", "out.dinitial_state"};

// The i-th array of a Gradients tuple, None of None.
py::object item(py::handle gradients, size_t i) {
  if (gradients.is_none()) return py::none();
  if (!py::isinstance<py::tuple>(gradients) || py::len(gradients) != std::size(kGradients))
    raise(FWP_DTYPE_ERROR, std::string("out: expected fwp_core.Gradients, got ") + Py_TYPE(gradients.ptr())->tp_name);
  return gradients[py::int_(i)];
}

// Takes and returns the six gradients in this order; None where the input is absent.
template <const Rule& rule>
py::tuple backward(py::handle d_o, py::handle q, py::handle k, py::handle v, py::handle beta, py::handle g,
                   py::handle dfinal_state, py::handle out, py::handle feature_map, py::handle qk_norm,
                   py::handle attention_norm, py::handle eps, py::handle scale, py::handle initial_state,
                   py::handle cu_seqlens, py::handle checkpoints) {
  Inputs in(rule, q, k, v, beta, g);
  in.h0.read_optional("initial_state", initial_state, &in.q);
  in.cu_seqlens.read_integers("cu_seqlens", cu_seqlens, &in.q);
  const fwp_options options = OptionArgs{feature_map, qk_norm, attention_norm, eps, scale}.read(in, true);
  check_inputs(in, options);

  Array cotangent, final_cotangent, kept;
  cotangent.read("do", d_o, &in.q);
  final_cotangent.read_optional("dfinal_state", dfinal_state, &in.q);
  kept.read_optional("checkpoints", checkpoints, &in.q);
  const Array* const of[] = {&in.q, &in.k, &in.v, &in.beta, &in.g, &in.h0};
  Array d[std::size(kGradients)];
  for (size_t i = 0; i < std::size(kGradients); ++i) {
    d[i].write_optional(kGradients[i], item(out, i), &in.q);
    if (d[i].present() && !of[i]->present())
      raise(FWP_ARGUMENT_ERROR, std::string(kGradients[i]) + ": expected None, as its input is, got an array");
    if (of[i]->present() && !d[i].present()) d[i].make(in.q, of[i]->rank(), of[i]->shape(), of[i]->dtype());
  }
  const Workspace workspace(rule.bwd_workspace, options, in);
  const auto call = [&] {
    const fwp_inputs inputs = in.tensors();
    const fwp_cotangents cotangents{sizeof cotangents, cotangent.tensor(), final_cotangent.tensor(), kept.tensor()};
    const fwp_gradients gradients{sizeof gradients, d[0].tensor(), d[1].tensor(), d[2].tensor(),
                                  d[3].tensor(),    d[4].tensor(), d[5].tensor()};
    return rule.bwd(&options, &inputs, &cotangents, &gradients, workspace.data(), workspace.bytes(), in.q.stream());
  };
  run(call, in, {&cotangent, &final_cotangent, &d[0], &d[1], &d[2], &d[3], &d[4], &d[5]});
  return py::make_tuple(d[0].object(), d[1].object(), d[2].object(), d[3].object(), d[4].object(), d[5].object());
}

template <const Rule& rule>
py::object step(py::handle q, py::handle k, py::handle v, py::handle beta, py::handle g, py::handle state,
                py::handle state_indices, py::handle feature_map, py::handle qk_norm, py::handle attention_norm,
                py::handle eps, py::handle scale, py::handle out) {
  Inputs in(rule, q, k, v, beta, g);
  in.state_indices.read_integers("state_indices", state_indices, &in.q);
  const fwp_options options = OptionArgs{feature_map, qk_norm, attention_norm, eps, scale}.read(in, false);
  Array S, o;
  S.write("state", state, &in.q);
  o.write_optional("out", out, &in.q);
  if (!o.present()) {  // whose shape is known once the inputs have been checked
    const fwp_inputs checked = in.tensors();
    size_t bytes = 0;
    check_scan(rule.step_workspace(&options, &checked, &bytes));
    int64_t shape[4];
    std::copy(in.v.shape(), in.v.shape() + in.v.rank(), shape);
    shape[in.v.rank() - 2] = in.heads();
    o.make(in.q, in.v.rank(), shape, in.v.dtype());
  }
  const Workspace workspace(rule.step_workspace, options, in);
  const auto call = [&] {
    const fwp_inputs inputs = in.tensors();
    return rule.step(&options, &inputs, S.tensor(), o.tensor(), workspace.data(), workspace.bytes(), in.q.stream());
  };
  run(call, in, {&S, &o});
  return o.object();
}

}  // namespace

void bind_scan(py::module_& m) {
  m.def("scan_options",
        [](py::handle feature_map, py::handle qk_norm, py::handle attention_norm, py::handle eps, py::handle scale) {
          const fwp_options options = OptionArgs{feature_map, qk_norm, attention_norm, eps, scale}.read(false);
          return py::make_tuple(options.qk_norm, options.attention_norm != 0, options.eps, options.scale);
        });
  m.def("linear_attention", &forward<kLinear>);
  m.def("linear_attention_backward", &backward<kLinear>);
  m.def("linear_attention_step", &step<kLinear>);
  m.def("linear_attention_diagnose", &diagnose<kLinear>);
  m.def("delta_rule_diagnose", &diagnose<kDelta>);
  m.def("delta_rule", &forward<kDelta>);
  m.def("delta_rule_backward", &backward<kDelta>);
  m.def("delta_rule_step", &step<kDelta>);
}

}  // namespace fwp::python
