// rope3d for Python: its function in _cpu and that in _cuda take the same arguments, but for where to run.
#pragma once
#include <array>
#include <vector>

#include "common/bind.h"
#include "rope3d/rope3d.h"

namespace evaat {

using Strides = std::array<int64_t, 3>;  // of clips, heads and tokens

// rotate: the C++ function. Where: int threads, or the Pointer of a stream.
template <class Where, class Rotate>
void bind_rope3d(py::module_& m, Rotate rotate) {
  py::class_<RopeCall>(m, "RopeCall", py::module_local())
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, bool, bool>(),
           py::arg("dtype"), py::arg("B"), py::arg("N"), py::arg("D"), py::arg("prefix"), py::arg("interleaved"), py::arg("inverse"));
  py::class_<RopeTensor>(m, "RopeTensor", py::module_local())
      .def(py::init([](Pointer x, Strides in, Pointer out, Strides to, int64_t heads) {
             return RopeTensor{at<const void>(x), at<void>(out), heads, in[0], in[1], in[2], to[0], to[1], to[2]};
           }),
           py::arg("x"), py::arg("strides"), py::arg("out"), py::arg("out_strides"), py::arg("heads"));
  m.def(
      "rope3d",
      [rotate](const RopeCall& call, const std::vector<RopeTensor>& tensors, Pointer cos, Pointer sin, int64_t table_b,
               int64_t table_h, Where where) {
        const RopeTable<float> table = {at<const float>(cos), at<const float>(sin), table_b, table_h};
        return rotate(call, tensors.data(), int(tensors.size()), table, place(where));
      },
      py::arg("call"), py::arg("tensors"), py::arg("cos"), py::arg("sin"), py::arg("table_b"), py::arg("table_h"), py::arg("where"), NoGil());
}

// The gradient of frequencies, of _cpu alone.
inline void bind_rope3d_freqs(py::module_& m) {
  m.attr("ROPE_CHUNK") = kRopeChunk;
  py::class_<RopeGradient>(m, "RopeGradient", py::module_local())
      .def(py::init([](const RopeTensor& grad, Pointer saved, Strides strides) {
             return RopeGradient{grad, {at<const void>(saved), strides[0], strides[1], strides[2]}};
           }),
           py::arg("grad"), py::arg("saved"), py::arg("saved_strides"));
  m.def(
      "rope3d_freqs",
      [](const RopeCall& call, const std::vector<RopeGradient>& tensors, Pointer cos, Pointer sin, int64_t table_b,
         int64_t table_h, Pointer positions, int64_t positions_b, Pointer partial, int threads) {
        const RopeTable<double> table = {at<const double>(cos), at<const double>(sin), table_b, table_h};
        const RopePositions rows = {at<const float>(positions), positions_b};
        return rope3d_freqs(call, tensors.data(), int(tensors.size()), table, rows, at<double>(partial), threads);
      },
      py::arg("call"), py::arg("tensors"), py::arg("cos"), py::arg("sin"), py::arg("table_b"), py::arg("table_h"), py::arg("positions"),
      py::arg("positions_b"), py::arg("partial"), py::arg("where"), NoGil());
}

}  // namespace evaat
