// The module evaat_fast._cuda: argument unpacking only. It links the CUDA runtime statically and imports without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "patchify/patchify.h"
#include "rope3d/rope3d.h"

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
  // The arguments of both are those of evaat_fast._cpu, but for the last one.
  m.def("rope3d", [](int dtype, const std::vector<std::array<int64_t, 9>>& tensors, Pointer cos, Pointer sin, int64_t table_b,
                     int64_t table_h, int64_t B, int64_t N, int64_t D, int64_t prefix, bool interleaved, bool inverse, Pointer stream) {
    evaat::RopeTensor x[2];
    int count = 0;
    for (const auto& t : tensors)
      x[count++] = {reinterpret_cast<const void*>(t[0]), reinterpret_cast<void*>(t[1]), t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
    const evaat::RopeTable table = {reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), table_b, table_h};
    return evaat::rope3d_cuda(dtype, x, count, table, B, N, D, prefix, interleaved, inverse, reinterpret_cast<void*>(stream));
  });
  m.def("rope3d_freqs", [](int dtype, const std::vector<std::array<int64_t, 13>>& tensors, Pointer cos, Pointer sin, int64_t table_b,
                           int64_t table_h, Pointer positions, int64_t positions_b, Pointer partial, int64_t B, int64_t N, int64_t D,
                           int64_t prefix, bool interleaved, bool inverse, Pointer stream) {
    evaat::RopeTensor grad[2];
    evaat::RopeSaved x[2];
    int count = 0;
    for (const auto& t : tensors) {
      grad[count] = {reinterpret_cast<const void*>(t[0]), reinterpret_cast<void*>(t[1]), t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
      x[count++] = {reinterpret_cast<const void*>(t[9]), t[10], t[11], t[12]};
    }
    const evaat::RopeTable64 table = {reinterpret_cast<const double*>(cos), reinterpret_cast<const double*>(sin), table_b, table_h};
    return evaat::rope3d_freqs_cuda(dtype, grad, x, count, table, {reinterpret_cast<const float*>(positions), positions_b},
                                    reinterpret_cast<double*>(partial), B, N, D, prefix, interleaved, inverse,
                                    reinterpret_cast<void*>(stream));
  });
}
