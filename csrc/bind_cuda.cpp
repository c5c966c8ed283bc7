// The module evaat_fast._cuda: argument unpacking only. It links the CUDA runtime statically and imports without a driver.
#include <pybind11/pybind11.h>

#include "patchify.h"

namespace py = pybind11;
using Pointer = std::uintptr_t;

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of evaat-fast, free of torch; every function returns a cudaError_t";
  m.def("patchify", [](Pointer video, Pointer table, Pointer out, int element_size, int64_t B, int64_t T, int64_t H, int64_t W,
                       int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t patch, Pointer stream) {
    return evaat::patchify_cuda(reinterpret_cast<const uint8_t*>(video), reinterpret_cast<const void*>(table),
                                reinterpret_cast<void*>(out), element_size, B, T, H, W, stride_b, stride_t, stride_h, patch,
                                reinterpret_cast<void*>(stream));
  });
}
