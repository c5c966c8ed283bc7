// The norms for Python.
#pragma once
#include "common/bind.h"
#include "norm/norm.h"

namespace evaat {

inline void bind_norm(py::module_& m) {
  m.def("norm_chunks", &norm_chunks, py::arg("M"));
  const auto forward = [&m](const char* name, int (*run)(const NormForward&, int)) {
    m.def(
        name,
        [run](int64_t M, int64_t C, Pointer x, int x_dtype, Pointer residual, int residual_dtype, Pointer out, int out_dtype,
              Pointer weight, Pointer bias, Pointer total, Pointer statistics, float eps, int where) {
          const NormRows in = {at<void>(x), x_dtype}, added = {at<void>(residual), residual_dtype}, to = {at<void>(out), out_dtype};
          return run({M, C, in, added, to, at<const float>(weight), at<const float>(bias), at<float>(total),
                      at<float>(statistics), eps}, where);
        },
        py::arg("M"), py::arg("C"), py::arg("x"), py::arg("x_dtype"), py::arg("residual"), py::arg("residual_dtype"), py::arg("out"),
        py::arg("out_dtype"), py::arg("weight"), py::arg("bias"), py::arg("total"), py::arg("statistics"), py::arg("eps"),
        py::arg("where"), NoGil());
  };
  const auto backward = [&m](const char* name, int (*run)(const NormBackward&, int)) {
    m.def(
        name,
        [run](int64_t M, int64_t C, Pointer dY, int dY_dtype, Pointer dR, int dR_dtype, Pointer x, int x_dtype, Pointer dx,
              int dx_dtype, Pointer weight, Pointer statistics, Pointer dr, Pointer sums, Pointer dweight, Pointer dbias, int where) {
          const NormRows of_out = {at<void>(dY), dY_dtype}, of_total = {at<void>(dR), dR_dtype};
          const NormRows saved = {at<void>(x), x_dtype}, to = {at<void>(dx), dx_dtype};
          return run({M, C, of_out, of_total, saved, to, at<const float>(weight), at<const float>(statistics), at<float>(dr),
                      at<float>(sums), at<float>(dweight), at<float>(dbias)}, where);
        },
        py::arg("M"), py::arg("C"), py::arg("dY"), py::arg("dY_dtype"), py::arg("dR"), py::arg("dR_dtype"), py::arg("x"),
        py::arg("x_dtype"), py::arg("dx"), py::arg("dx_dtype"), py::arg("weight"), py::arg("statistics"), py::arg("dr"), py::arg("sums"),
        py::arg("dweight"), py::arg("dbias"), py::arg("where"), NoGil());
  };
  forward("add_norm", add_norm), forward("swiglu_norm", swiglu_norm);
  backward("add_norm_backward", add_norm_backward), backward("swiglu_norm_backward", swiglu_norm_backward);
}

}  // namespace evaat
