// rope3d for Python: the functions of _cpu and of _cuda take the same arguments, but for where to run.
#pragma once
#include <array>
#include <vector>

#include "common/bind.h"
#include "rope3d/rope3d.h"

namespace evaat {

// rotate and gradient: the C++ functions. Where: int threads, or the Pointer of a stream.
template <class Where, class Rotate, class Gradient>
void bind_rope3d(py::module_& m, Rotate rotate, Gradient gradient) {
  using Strides = std::array<int64_t, 3>;  // of clips, heads and tokens
  m.attr("ROPE_CHUNK") = kRopeChunk;
  py::class_<RopeCall>(m, "RopeCall", py::module_local())
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, bool, bool>(),
           py::arg("dtype"), py::arg("B"), py::arg("N"), py::arg("D"), py::arg("prefix"), py::arg("interleaved"), py::arg("inverse"));
  py::class_<RopeTensor>(m, "RopeTensor", py::module_local())
      .def(py::init([](Pointer x, Strides in, Pointer out, Strides to, int64_t heads) {
             return RopeTensor{at<const void>(x), at<void>(out), heads, in[0], in[1], in[2], to[0], to[1], to[2]};
           }),
           py::arg("x"), py::arg("strides"), py::arg("out"), py::arg("out_strides"), py::arg("heads"));
  py::class_<RopeGradient>(m, "RopeGradient", py::module_local())
      .def(py::init([](const RopeTensor& grad, Pointer saved, Strides strides) {
             return RopeGradient{grad, {at<const void>(saved), strides[0], strides[1], strides[2]}};
           }),
           py::arg("grad"), py::arg("saved"), py::arg("saved_strides"));
  m.def(
      "rope3d",
      [rotate](const RopeCall& call, const std::vector<RopeTensor>& tensors, Pointer cos, Pointer sin, int64_t table_b,
               int64_t table_h, Where where) {
        const RopeTable<float> table = {at<const float>(cos), at<const float>(sin), table_b, table_h};
        return rotate(call, tensors.data(), int(tensors.size()), table, place(where));
      },
      py::arg("call"), py::arg("tensors"), py::arg("cos"), py::arg("sin"), py::arg("table_b"), py::arg("table_h"), py::arg("where"), NoGil());
  m.def(
      "rope3d_freqs",
      [gradient](const RopeCall& call, const std::vector<RopeGradient>& tensors, Pointer cos, Pointer sin, int64_t table_b,
                 int64_t table_h, Pointer positions, int64_t positions_b, Pointer partial, Where where) {
        const RopeTable<double> table = {at<const double>(cos), at<const double>(sin), table_b, table_h};
        const RopePositions rows = {at<const float>(positions), positions_b};
        return gradient(call, tensors.data(), int(tensors.size()), table, rows, at<double>(partial), place(where));
      },
      py::arg("call"), py::arg("tensors"), py::arg("cos"), py::arg("sin"), py::arg("table_b"), py::arg("table_h"), py::arg("positions"),
      py::arg("positions_b"), py::arg("partial"), py::arg("where"), NoGil());
}

}  // namespace evaat
