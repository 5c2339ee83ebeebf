// Version, threads and instruction sets.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind.hpp"
#include "errors.hpp"
#include "fwp/fwp.h"

namespace fwp::python {

void bind_config(pybind11::module_& m) {
  m.attr("__version__") = fwp_version();
  m.def("compiler", &fwp_compiler);
  m.def("set_num_threads", [](int threads) { check(fwp_set_num_threads(threads)); });
  m.def("get_num_threads", &fwp_get_num_threads);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const char* const* isa = fwp_available_isas(); *isa != nullptr; ++isa) names.emplace_back(*isa);
    return names;
  });
  m.def("isa", [] {
    const char* const name = fwp_isa();
    if (name == nullptr) raise(FWP_ARGUMENT_ERROR, fwp_last_error());
    return name;
  });
  m.def("use_isa", [](const std::string& name) { check(fwp_use_isa(name.c_str())); });
  m.def("isa_calls", [](const std::string& name) { return fwp_isa_calls(name.c_str()); });
  m.def("block_size", &fwp_block_size);
  m.def("fma_peak", [](const std::string& dtype, double seconds) {
    if (dtype != "float32" && dtype != "float64")
      raise(FWP_DTYPE_ERROR, "dtype: expected 'float32' or 'float64', got '" + dtype + "'");
    const pybind11::gil_scoped_release nogil;
    return 1e-9 * fwp_fma_peak(dtype == "float64" ? 64 : 32, seconds);
  });
  m.def("cache_limit", [] {
    size_t bytes = 0;
    check(fwp_cache_limit(&bytes));
    return bytes;
  });
  m.def("cache_idle", &fwp_cache_idle);
  m.def("empty_cache", &fwp_empty_cache);
  m.def("cuda_state", &fwp_cuda_state);
  m.def("check_device", [](int device) { check(fwp_device_check(device)); });
}

}  // namespace fwp::python
