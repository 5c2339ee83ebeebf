#include "validate.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "../cpu/dispatch.hpp"
#include "backends.hpp"
#include "error.hpp"

namespace fwp::core {
namespace {

// A struct of the caller's version: fields that its struct_size does not cover keep their defaults, fields that this
// library does not know must be zero.
template <class Struct>
Struct read_struct(const char* name, const Struct* from, Struct defaults) {
  constexpr size_t kMaxSize = 4096;
  if (from == nullptr) fail(FWP_ARGUMENT_ERROR, name, ": expected a struct, got NULL");
  const size_t size = from->struct_size;
  if (size < sizeof(size_t) || size > kMaxSize)
    fail(FWP_ARGUMENT_ERROR, name, ": expected struct_size to be sizeof the struct, got ", size);
  const size_t known = std::min(size, sizeof(Struct)) / sizeof(size_t) * sizeof(size_t);
  std::memcpy(&defaults, from, known);
  const char* const bytes = reinterpret_cast<const char*>(from);
  if (std::any_of(bytes + known, bytes + std::max(size, known), [](char byte) { return byte != 0; }))
    fail(FWP_UNSUPPORTED_ERROR, name, ": expected no fields beyond those of version ", FWP_ABI_VERSION,
         " of the interface, got some that are set");
  return defaults;
}

void check_divides(const char* name, int64_t heads, int64_t all) {
  if (heads == all || (heads > 0 && all % heads == 0)) return;
  fail(FWP_SHAPE_ERROR, name, ": expected a number of heads that divides H=", all, ", got ", heads);
}

void check_absent(const char* name, const void* given, const char* reason) {
  if (given != nullptr) fail(FWP_ARGUMENT_ERROR, name, ": expected NULL ", reason, ", got a tensor");
}

// The map, and the number of its features for rows of size n.
Features describe(const fwp_feature_map& map, int64_t n) {
  constexpr Map kinds[] = {Map::none, Map::relu, Map::elu1, Map::softmax, Map::dpfp, Map::favor};
  if (map.kind < FWP_MAP_RELU || map.kind > FWP_MAP_FAVOR)
    fail(FWP_ARGUMENT_ERROR, "feature_map: expected a kind from ", FWP_MAP_RELU, " to ", FWP_MAP_FAVOR, ", got ",
         map.kind);
  Features f;
  f.map = kinds[map.kind];
  f.inputs = f.outputs = n;
  if (f.map == Map::dpfp) {
    const int64_t most = std::max<int64_t>(2 * n - 1, 1);
    if (map.nu < 1 || map.nu > most)
      fail(FWP_ARGUMENT_ERROR, "feature_map: expected nu from 1 to ", most, " for rows of size ", n, ", got ", map.nu);
    f.nu = map.nu;
    const int64_t sizes[] = {2, n, f.nu};
    check_count("feature_map", sizes, 3);
    f.outputs = 2 * n * f.nu;
  }
  return f;
}

Tensor read_projection(const fwp_feature_map& map, const Axes& axes, std::initializer_list<DType> dtypes) {
  const char* const name = "projection";
  if (!(map.eps >= 0) || std::isinf(map.eps))
    fail(FWP_ARGUMENT_ERROR, "feature_map: expected a finite eps of 0 or more, got ", map.eps);
  const Tensor R = read_tensor(name, map.projection, dtypes, {axes});
  if (R.shape[0] < 1) fail(FWP_SHAPE_ERROR, name, ": expected at least one row, got shape (0, ", R.shape[1], ")");
  return R;
}

Features read_features(const fwp_feature_map* given, int64_t n, DType dtype, Tensor* projection) {
  const fwp_feature_map map = read_struct<fwp_feature_map>("feature_map", given, FWP_FEATURE_MAP_INIT);
  Features f = describe(map, n);
  if (f.map != Map::favor) return f;
  const Tensor R = read_projection(map, {{"m"}, {"K_in", n}}, {accumulation(dtype)});
  f.directions = R.shape[0];
  f.outputs = 2 * f.directions;
  f.projection = R.data;
  f.projection_stride = R.stride[0];
  f.log_factor = -std::log(static_cast<double>(f.outputs)) / 2;
  f.floor = map.eps / std::sqrt(static_cast<double>(f.outputs));
  *projection = R;
  return f;
}

std::string device_name(int device) { return device == kHost ? "the CPU" : "cuda:" + std::to_string(device); }

// A call runs where its first array is.
void place(const Tensor& first, Problem& p) {
  p.device = first.device;
  backend(first.name, p.device);
  if (p.device != kHost) return;
  check_isa();
  p.level = cpu::level();
  p.threads = cpu::get_num_threads();
}

void check_same_device(const Tensor& x, const char* first, int device) {
  if (x.device != device)
    fail(FWP_DEVICE_ERROR, x.name, ": expected a tensor on ", device_name(device), ", as ", first, " is, got one on ",
         device_name(x.device));
}

}  // namespace

int64_t feature_size(const fwp_feature_map* given, int64_t n) {
  if (n < 0) fail(FWP_ARGUMENT_ERROR, "n: expected a size of 0 or more, got ", n);
  const fwp_feature_map map = read_struct<fwp_feature_map>("feature_map", given, FWP_FEATURE_MAP_INIT);
  const Features f = describe(map, n);
  if (f.map != Map::favor) return f.outputs;
  return 2 * read_projection(map, {{"m"}, {"K_in", n}}, {DType::f32, DType::f64}).shape[0];
}

std::string known_isas() {
  std::string names;
  for (const char* const* isa = cpu::available_isas(); *isa != nullptr; ++isa)
    names += (names.empty() ? "" : ", ") + std::string(*isa);
  return names;
}

void check_isa() {
  if (cpu::isa() != nullptr) return;
  const char* const wanted = std::getenv("FWP_ISA");
  fail(FWP_ARGUMENT_ERROR, "FWP_ISA: expected one of ", known_isas(), ", got ", wanted != nullptr ? wanted : "nothing");
}

void CallMemory::add(const Region& region, Access access) {
  if (region.item == 0) return;
  regions_[region_count_] = region;
  access_[region_count_++] = access;
}

void CallMemory::need_contiguous_last_axis(const Tensor& x) {
  if (strided_ == nullptr && !x.last_axis_contiguous()) strided_ = x.name;
}

void CallMemory::check() const {
  for (size_t i = 0; i < region_count_; ++i) {
    const Region& out = regions_[i];
    if (access_[i] != Access::write) continue;
    if (overlaps_itself(out))
      fail(FWP_ARGUMENT_ERROR, out.name, ": expected an output without overlap, but its own elements share memory");
    for (size_t j = 0; j < region_count_; ++j)
      if (j != i && overlap(out, regions_[j]))
        fail(FWP_ARGUMENT_ERROR, out.name, ": expected an output without overlap, but it shares memory with ",
             regions_[j].name);
  }
  if (strided_ != nullptr)
    fail(FWP_UNSUPPORTED_ERROR, strided_, ": expected a contiguous last axis, got a strided one");
}

Call::Call(Rule rule, bool step, const fwp_options* options, const fwp_inputs* inputs) {
  const fwp_options settings = read_struct<fwp_options>("options", options, FWP_OPTIONS_INIT);
  const fwp_inputs in = read_struct<fwp_inputs>("inputs", inputs, FWP_INPUTS_INIT);

  Problem& p = problem;
  p.rule = rule;
  p.step = step;
  p.scale = settings.scale;
  if (!step) p.interrupt = {settings.interrupt, settings.interrupt_data};

  read_options(settings);
  read_heads(in, settings);
  read_gates(in);
  p.N = batch_;
  if (step) {
    check_absent("h0", in.h0, "in a step, whose state is an argument of its own");
    check_absent("cu_seqlens", in.cu_seqlens, "in a step");
    if (in.state_indices != nullptr) slots_ = read_integers("state_indices", in.state_indices, {"B", batch_});
  } else {
    check_absent("state_indices", in.state_indices, "outside of a step");
    if (in.cu_seqlens != nullptr) read_sequences(in.cu_seqlens);
    if (in.h0 != nullptr) p.h0 = read_states("h0", in.h0, Access::read);
  }
  check_sizes();
}

void Call::read_options(const fwp_options& settings) {
  constexpr Norm norms[] = {Norm::none, Norm::sum, Norm::l2};
  if (settings.qk_norm < FWP_NORM_NONE || settings.qk_norm > FWP_NORM_L2)
    fail(FWP_ARGUMENT_ERROR, "qk_norm: expected a norm from ", FWP_NORM_NONE, " to ", FWP_NORM_L2, ", got ",
         settings.qk_norm);
  if (settings.attention_norm != 0 && settings.attention_norm != 1)
    fail(FWP_ARGUMENT_ERROR, "attention_norm: expected 0 or 1, got ", settings.attention_norm);
  if (!(settings.eps >= 0) || std::isinf(settings.eps))
    fail(FWP_ARGUMENT_ERROR, "eps: expected a finite number of 0 or more, got ", settings.eps);
  if (settings.check_only != 0 && settings.check_only != 1)
    fail(FWP_ARGUMENT_ERROR, "check_only: expected 0 or 1, got ", settings.check_only);
  if (settings.reserved != 0) fail(FWP_ARGUMENT_ERROR, "reserved: expected 0, got ", settings.reserved);
  check_only_ = settings.check_only == 1;
  problem.features.norm = norms[settings.qk_norm];
  problem.attention_norm = settings.attention_norm == 1;
  problem.eps = settings.eps;
}

// q decides the dtype and the sizes B, T, K that k and v must have, and in a step whether there is a T axis.
void Call::read_heads(const fwp_inputs& in, const fwp_options& settings) {
  Problem& p = problem;
  const std::initializer_list<DType> dtypes{DType::f32, DType::f64, DType::f16, DType::bf16};
  const Axes tokens{{"B"}, {"T"}, {"Hq"}, {"K"}}, token{{"B"}, {"Hq"}, {"K"}};
  const Tensor q = p.step ? read_tensor("q", in.q, dtypes, {token, tokens}) : read_tensor("q", in.q, dtypes, {tokens});
  memory_.add(q.region, Access::read);
  p.dtype = q.dtype;
  place(q, p);
  batch_ = q.shape[0];
  has_time_ = q.rank == tokens.rank;
  p.T = has_time_ ? q.shape[1] : 1;
  p.K = q.shape[q.rank - 1];
  const Norm norm = p.features.norm;
  p.features.inputs = p.features.outputs = p.K;
  if (settings.feature_map != nullptr) {
    Tensor projection;
    p.features = read_features(settings.feature_map, p.K, p.dtype, &projection);
    p.features.norm = norm;
    p.K = p.features.outputs;
    memory_.add(projection.region, Access::read);
    if (projection.data != nullptr) {
      check_device(projection);
      memory_.need_contiguous_last_axis(projection);
    }
  }
  const Tensor k = read("k", in.k, p.dtype, axes({"Hk"}, key_axis()), Access::read);
  const Tensor v = read("v", in.v, p.dtype, axes({"Hv"}, {"V"}), Access::read);
  p.V = v.shape[v.rank - 1];

  q_heads_ = q.shape[q.rank - 2];
  k_heads_ = k.shape[k.rank - 2];
  v_heads_ = v.shape[v.rank - 2];
  p.H = std::max({q_heads_, k_heads_, v_heads_});
  check_divides("q", q_heads_, p.H);
  check_divides("k", k_heads_, p.H);
  check_divides("v", v_heads_, p.H);
  p.q = rows(q);
  p.k = rows(k);
  p.v = rows(v);
}

void Call::read_gates(const fwp_inputs& in) {
  Problem& p = problem;
  const Axes scalar = axes({"H", p.H}), channel = axes({"H", p.H}, {"K", p.K});
  if (in.beta != nullptr || p.rule == Rule::delta)
    p.beta = rows(read("beta", in.beta, {p.dtype, DType::f32}, {scalar}, Access::read));
  if (in.g != nullptr) {
    p.g = rows(read("g", in.g, {p.dtype, DType::f32}, {scalar, channel}, Access::read));
    p.decay = in.g->ndim == scalar.rank ? Decay::scalar : Decay::channel;
  }
}

void Call::add_outputs(const fwp_outputs* outputs) {
  const fwp_outputs out = read_struct<fwp_outputs>("outputs", outputs, FWP_OUTPUTS_INIT);
  problem.o = rows(read("o", out.o, problem.dtype, axes({"H", problem.H}, {"V", problem.V}), Access::write));
  if (out.hT != nullptr) problem.hT = read_states("hT", out.hT, Access::write);
  if (out.checkpoints != nullptr) problem.checkpoints = read_checkpoints(out.checkpoints, Access::write);
}

void Call::add_step_outputs(const DLTensor* state, const DLTensor* o) {
  problem.o = rows(read("o", o, problem.dtype, axes({"H", problem.H}, {"V", problem.V}), Access::write));
  problem.hT = read_states("state", state, Access::write);
  problem.h0 = problem.hT;
}

void Call::add_probes(const DLTensor* probes) {
  const Axes all{{"B", batch_}, {"T", problem.T}, {"H", problem.H}, {"probes", kProbes}};
  problem.o = rows(read("probes", probes, accumulation(problem.dtype), all, Access::write));
}

void Call::add_cotangents(const fwp_cotangents* cotangents) {
  const fwp_cotangents in = read_struct<fwp_cotangents>("cotangents", cotangents, FWP_COTANGENTS_INIT);
  problem.d_o = rows(read("d_o", in.d_o, problem.dtype, axes({"H", problem.H}, {"V", problem.V}), Access::read));
  if (in.d_hT != nullptr) problem.d_hT = read_states("d_hT", in.d_hT, Access::read);
  if (in.checkpoints != nullptr) problem.checkpoints = read_checkpoints(in.checkpoints, Access::read);
}

void Call::add_gradients(const fwp_gradients* gradients) {
  const fwp_gradients out = read_struct<fwp_gradients>("gradients", gradients, FWP_GRADIENTS_INIT);
  Problem& p = problem;
  if (p.beta.data == nullptr) check_absent("dbeta", out.dbeta, "because beta is absent");
  if (p.g.data == nullptr) check_absent("dg", out.dg, "because g is absent");
  if (p.h0.data == nullptr) check_absent("dh0", out.dh0, "because h0 is absent");

  const Axes scalar = axes({"H", p.H}), channel = axes({"H", p.H}, {"K", p.K});
  const auto write = [this](const char* name, const DLTensor* tensor, DType dtype, const Axes& axes) {
    return tensor != nullptr ? rows(read(name, tensor, dtype, axes, Access::write)) : Rows{};
  };
  p.dq = write("dq", out.dq, p.dtype, axes({"Hq", q_heads_}, key_axis()));
  p.dk = write("dk", out.dk, p.dtype, axes({"Hk", k_heads_}, key_axis()));
  p.dv = write("dv", out.dv, p.dtype, axes({"Hv", v_heads_}, {"V", p.V}));
  p.dbeta = write("dbeta", out.dbeta, p.beta.dtype, scalar);
  p.dg = write("dg", out.dg, p.g.dtype, p.decay == Decay::channel ? channel : scalar);
  if (out.dh0 != nullptr) p.dh0 = read_states("dh0", out.dh0, Access::write);
}

void Call::add_workspace(void* workspace, size_t bytes, size_t needed) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  if (address % kWorkspaceAlignment != 0)
    fail(FWP_ARGUMENT_ERROR, "workspace: expected memory aligned to ", kWorkspaceAlignment, " bytes, got an address ",
         address % kWorkspaceAlignment, " bytes past a multiple");
  if (bytes < needed) fail(FWP_ARGUMENT_ERROR, "workspace: expected at least ", needed, " bytes, got ", bytes);
  Region region;
  region.name = "workspace";
  region.first = address;
  region.end = address + needed;
  region.item = static_cast<int64_t>(needed);
  memory_.add(region, Access::write);
}

Tensor Call::read(const char* name, const DLTensor* tensor, std::initializer_list<DType> dtypes,
                  std::initializer_list<Axes> shapes, Access access) {
  const Tensor x = read_tensor(name, tensor, dtypes, shapes);
  check_device(x);
  memory_.add(x.region, access);
  return x;
}

Tensor Call::read(const char* name, const DLTensor* tensor, DType dtype, const Axes& axes, Access access) {
  return read(name, tensor, {dtype}, {axes}, access);
}

States Call::read_states(const char* name, const DLTensor* tensor, Access access) {
  const Problem& p = problem;
  const Axis columns = p.attention_norm ? Axis{"V+1", p.V + 1} : Axis{"V", p.V};
  const Axis first = has_slots() ? Axis{"S"} : Axis{p.step ? "B" : "N", p.N};
  const Tensor x = read(name, tensor, accumulation(p.dtype), {first, {"H", p.H}, {"K", p.K}, columns}, access);
  memory_.need_contiguous_last_axis(x);
  slot_count_ = x.shape[0];
  return {x.data, x.stride[0], x.stride[1], x.stride[2]};
}

void* Call::read_checkpoints(const DLTensor* tensor, Access access) {
  const Axes axes{{"elements", backend(problem).checkpoint_elements(problem)}};
  const Tensor x = read("checkpoints", tensor, accumulation(problem.dtype), axes, access);
  memory_.need_contiguous_last_axis(x);
  return x.data;
}

void Call::check_device(const Tensor& x) const { check_same_device(x, "q", problem.device); }

void Call::read_sequences(const DLTensor* cu_seqlens) {
  const char* const name = "cu_seqlens";
  const Integers given = read_integers(name, cu_seqlens, {"N+1"});
  if (given.count() == 0) fail(FWP_SHAPE_ERROR, name, ": expected at least one offset, got none");
  if (batch_ != 1) fail(FWP_ARGUMENT_ERROR, name, ": expected B=1 for packed sequences, got B=", batch_);
  problem.N = given.count() - 1;
  if (given.tensor.device != kHost) {
    if (problem.N == 0 && problem.T != 0)  // the one offset is 0, and cannot be clamped
      fail(FWP_ARGUMENT_ERROR, name, ": expected it to end with T=", problem.T, ", got one offset");
    problem.device_cu_seqlens = {given.tensor.data, given.tensor.stride[0], given.wide};
    return;
  }

  // Copied first and checked then, so that nobody can change a value between check and use.
  offsets_.resize(static_cast<size_t>(given.count()));
  for (size_t n = 0; n < offsets_.size(); ++n) offsets_[n] = given.at(static_cast<int64_t>(n));
  if (offsets_.front() != 0) fail(FWP_ARGUMENT_ERROR, name, ": expected it to start with 0, got ", offsets_.front());
  const auto fall = std::adjacent_find(offsets_.begin(), offsets_.end(), std::greater<>());
  if (fall != offsets_.end())
    fail(FWP_ARGUMENT_ERROR, name, ": expected offsets that never fall, got ", fall[0], " before ", fall[1]);
  if (offsets_.back() != problem.T)
    fail(FWP_ARGUMENT_ERROR, name, ": expected it to end with T=", problem.T, ", got ", offsets_.back());
  problem.cu_seqlens = offsets_.data();
}

Integers Call::read_integers(const char* name, const DLTensor* tensor, Axis axis) {
  const Integers given = core::read_integers(name, tensor, axis);
  if (given.tensor.device != kHost) check_device(given.tensor);
  memory_.add(given.tensor.region, Access::read);
  return given;
}

// The slots, and once more in order, where one that is given twice meets itself.
size_t Call::slot_bytes() const {
  if (!has_slots() || problem.device != kHost) return 0;
  const size_t bytes = 2 * static_cast<size_t>(slots_.count()) * sizeof(int64_t);
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

void Call::read_slots(void* memory) {
  problem.slots = has_slots() ? slot_count_ : 0;
  if (!has_slots()) return;
  if (slots_.tensor.device != kHost) {
    problem.device_state_indices = {slots_.tensor.data, slots_.tensor.stride[0], slots_.wide};
    return;
  }
  const char* const name = "state_indices";
  if (problem.device != kHost) {
    offsets_.resize(2 * static_cast<size_t>(slots_.count()));
    memory = offsets_.data();
  }
  int64_t *const slots = static_cast<int64_t*>(memory), *const sorted = slots + slots_.count();
  int64_t* const end = sorted + slots_.count();
  for (int64_t n = 0; n < slots_.count(); ++n) {
    slots[n] = sorted[n] = slots_.at(n);
    if (slots[n] != kNoSlot && (slots[n] < 0 || slots[n] >= slot_count_))
      fail(FWP_ARGUMENT_ERROR, name, ": expected slots from 0 to S-1=", slot_count_ - 1, ", or ", kNoSlot,
           " for none, got ", slots[n]);
  }
  std::sort(sorted, end);
  const int64_t* const twice = std::adjacent_find(std::upper_bound(sorted, end, kNoSlot), end);
  if (twice != end) fail(FWP_ARGUMENT_ERROR, name, ": expected every slot at most once, got ", *twice, " twice");
  problem.state_indices = slots;
}

// Every size that a kernel may compute is bounded here, also where stride 0 makes a huge array of a few bytes.
void Call::check_sizes() const {
  const Problem& p = problem;
  const int64_t work[] = {batch_, p.T, p.H, p.K, p.V};
  const int64_t states[] = {p.N, p.H, p.K, p.V + 1};
  check_count("q, k, v", work, 5);
  check_count("q, k, v", states, 4);
}

Axis Call::key_axis() const { return {problem.features.map == Map::none ? "K" : "K_in", problem.features.inputs}; }

Axes Call::axes(Axis heads) const {
  if (!has_time_) return {{"B", batch_}, heads};
  return {{"B", batch_}, {"T", problem.T}, heads};
}

Axes Call::axes(Axis heads, Axis size) const {
  Axes all = axes(heads);
  all.axis[all.rank++] = size;
  return all;
}

Rows Call::rows(const Tensor& x) {
  const int head = has_time_ ? 2 : 1;
  if (x.rank == head + 2) memory_.need_contiguous_last_axis(x);
  Rows rows;
  rows.data = x.data;
  rows.dtype = x.dtype;
  rows.b = x.stride[0];
  rows.t = has_time_ ? x.stride[1] : 0;
  rows.h = x.stride[head];
  rows.group = x.shape[head] > 0 ? problem.H / x.shape[head] : 1;
  return rows;
}

MapCall::MapCall(const fwp_feature_map* map, const DLTensor* x) {
  Problem& p = problem;
  const Tensor given = read_tensor("x", x, {DType::f32, DType::f64, DType::f16, DType::bf16}, {{{"M"}, {"K_in"}}});
  place(given, p);
  p.dtype = given.dtype;
  p.T = given.shape[0];
  Tensor projection;
  p.features = read_features(map, given.shape[1], p.dtype, &projection);
  p.K = p.features.outputs;
  const int64_t work[] = {p.T, p.K};
  check_count("x", work, 2);
  p.q = rows("x", x, {"K_in", p.features.inputs}, CallMemory::Access::read);
  memory_.add(projection.region, CallMemory::Access::read);
  if (projection.data == nullptr) return;
  check_same_device(projection, "x", p.device);
  memory_.need_contiguous_last_axis(projection);
}

void MapCall::add_output(const DLTensor* y) { problem.o = rows("y", y, {"K", problem.K}, CallMemory::Access::write); }

void MapCall::add_gradients(const DLTensor* d_y, const DLTensor* d_x) {
  problem.d_o = rows("d_y", d_y, {"K", problem.K}, CallMemory::Access::read);
  problem.dq = rows("d_x", d_x, {"K_in", problem.features.inputs}, CallMemory::Access::write);
}

Rows MapCall::rows(const char* name, const DLTensor* tensor, Axis size, CallMemory::Access access) {
  const Tensor x = read_tensor(name, tensor, {problem.dtype}, {{{"M", problem.T}, size}});
  check_same_device(x, "x", problem.device);
  memory_.add(x.region, access);
  memory_.need_contiguous_last_axis(x);
  Rows rows;
  rows.data = x.data;
  rows.dtype = x.dtype;
  rows.t = x.stride[0];
  return rows;
}

}  // namespace fwp::core
