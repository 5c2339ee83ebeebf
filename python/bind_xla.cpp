// XLA's custom calls as capsules, by the names that they are registered under.
#include "bind.hpp"
#include "xla.hpp"

namespace py = pybind11;

namespace fwp::python {

void bind_xla(py::module_& m) {
  m.def("xla_targets", [] {
    py::dict capsules;
    for (const xla::Target* target = xla::targets(); target != xla::targets() + xla::target_count(); ++target)
      capsules[target->name] = py::capsule(reinterpret_cast<void*>(target->handler));
    return capsules;
  });
}

}  // namespace fwp::python
