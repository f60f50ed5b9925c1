// The module gradfuse._C: its build, and what each op binds.
#include <pybind11/pybind11.h>

#include <ATen/Parallel.h>

#include "build_info.h"  // of setup.py
#include "cpu/caches.h"
#include "cpu/isa.h"
#include "tensor/checks.h"

namespace gradfuse {

void bind_clip(pybind11::module_& m);
void bind_adaptive_clip(pybind11::module_& m);
void bind_batch_norm(pybind11::module_& m);
void bind_deferred(pybind11::module_& m);
void bind_optim(pybind11::module_& m);
void bind_row_norm(pybind11::module_& m);
void bind_stream(pybind11::module_& m);

}  // namespace gradfuse

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace gradfuse;
  pybind11::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const TypeError& e) { PyErr_SetString(PyExc_TypeError, e.what()); }
  });
  m.attr("torch_version") = GRADFUSE_TORCH_VERSION;
  m.attr("cuda_version") = GRADFUSE_CUDA_VERSION;
  m.attr("cuda_archs") = GRADFUSE_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.def("isa", &cpu::isa_name);
  m.def("set_isa", &cpu::set_isa, pybind11::arg("name"));
  m.def("set_last_level_cache", &cpu::set_last_level_cache, pybind11::arg("bytes"));
  m.def("num_threads", [] { return at::get_num_threads(); });
  bind_clip(m);
  bind_adaptive_clip(m);
  bind_batch_norm(m);
  bind_deferred(m);
  bind_optim(m);
  bind_row_norm(m);
  bind_stream(m);
}
