// The module evaat_fast._cpu: argument unpacking only. Pointers come as integers; Python has checked everything else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu.h"
#include "patchify.h"

namespace py = pybind11;
using Pointer = std::uintptr_t;

namespace {

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void check(int status, const char* op) {
  if (status == evaat::kBadDtype) throw py::type_error(std::string(op) + ": dtype not supported by the cpu backend");
  if (status == evaat::kBadIndex) throw py::index_error(std::string(op) + ": index out of range");
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "C++ kernels of evaat-fast for the CPU, free of torch";
  m.def("isa", &evaat::isa);
  m.def("set_isa", &evaat::set_isa, py::arg("level"));
  m.def("patchify", [](Pointer video, Pointer table, Pointer out, int element_size, int64_t B, int64_t T, int64_t H, int64_t W,
                       int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t patch, int threads) {
    py::gil_scoped_release release;
    evaat::patchify(as<const uint8_t>(video), as<const void>(table), as<void>(out), element_size, B, T, H, W, stride_b, stride_t,
                    stride_h, patch, threads);
  });
}
