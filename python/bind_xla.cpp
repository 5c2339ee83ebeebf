// XLA's custom calls as capsules, by the names that they are registered under.
#include <string>

#include "bind.hpp"
#include "xla.hpp"

namespace py = pybind11;

namespace fwp::python {

void bind_xla(py::module_& m) {
  // platform: by XLA's name, "cpu" or "CUDA".
  m.def("xla_targets", [](const std::string& platform) {
    py::dict capsules;
    for (const xla::Target* target = xla::targets(); target != xla::targets() + xla::target_count(); ++target)
      capsules[target->name] = py::capsule(reinterpret_cast<void*>(platform == "CUDA" ? target->cuda : target->cpu));
    return capsules;
  });
}

}  // namespace fwp::python
