// The module evaat_fast._cpu: argument unpacking only. Pointers come as integers; Python has checked everything else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu.h"
#include "patchify.h"
#include "rope3d.h"

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
  // Each tensor: in, out, heads, then the strides of b, h, n of in and of out.
  m.def("rope3d", [](int dtype, const std::vector<std::array<int64_t, 9>>& tensors, Pointer cos, Pointer sin, int64_t table_b,
                     int64_t table_h, int64_t B, int64_t N, int64_t D, int64_t prefix, bool interleaved, bool inverse, int threads) {
    evaat::RopeTensor x[2];
    int count = 0;
    for (const auto& t : tensors)
      x[count++] = {as<const void>(Pointer(t[0])), as<void>(Pointer(t[1])), t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
    int status;
    {
      py::gil_scoped_release release;
      status = evaat::rope3d(dtype, x, count, {as<const float>(cos), as<const float>(sin), table_b, table_h}, B, N, D, prefix,
                             interleaved, inverse, threads);
    }
    check(status, "rope3d");
  });
}
