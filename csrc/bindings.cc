// The Python side of a native library, compiled once into each of them: these functions and nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "grid_limit.h"
#include "registrations.h"
#include "source_tree.h"
#include "version.h"
#include "workspace.h"

namespace nb = nanobind;

NB_MODULE(JAX_BSK_MODULE, m) {
  m.def("registrations", [] {
    nb::dict targets;
    for (const auto& [name, handler] : jax_bsk::Registrations()) {
      targets[name.c_str()] = nb::capsule(reinterpret_cast<void*>(handler));
    }
    return targets;
  });
  m.def("buffers", &jax_bsk::Buffers);  // {target: {"operands" | "results" | "optional": names}}
  m.def("workspace", &jax_bsk::WorkspaceBytes, nb::arg("target"), nb::arg("sizes"));  // bytes, for CUDA
  m.def("build_info", [] {
    auto info = jax_bsk::BuildInfo();
    info["version"] = std::string(JAX_BSK_VERSION);
    info["source_tree"] = std::string(JAX_BSK_SOURCE_TREE);  // git's hash of csrc/
    info["ffi_api"] = std::vector<int64_t>{XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    return info;
  });
  // For tests (jax_bsk/qa/testing/grid.py); nothing of the CPU's heeds it.
  m.def("limit_grid", [](int ctas) { jax_bsk::grid_limit = ctas; }, nb::arg("ctas"));
}
