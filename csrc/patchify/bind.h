// patchify for Python, of _cpu and of _cuda alike.
#pragma once
#include "common/bind.h"
#include "patchify/patchify.h"

namespace evaat {

// run: the C++ function. Where: int threads, or the Pointer of a stream.
template <class Where, class Run>
void bind_patchify(py::module_& m, Run run) {
  m.def(
      "patchify",
      [run](Pointer video, Pointer table, Pointer out, int element_size, int64_t B, int64_t T, int64_t H, int64_t W, int64_t stride_b,
            int64_t stride_t, int64_t stride_h, int64_t patch, Where where) {
        const PatchifyCall call = {element_size, B, T, H, W, patch, stride_b, stride_t, stride_h};
        return run(call, at<const uint8_t>(video), at<const void>(table), at<void>(out), place(where));
      },
      py::arg("video"), py::arg("table"), py::arg("out"), py::arg("element_size"), py::arg("B"), py::arg("T"), py::arg("H"), py::arg("W"),
      py::arg("stride_b"), py::arg("stride_t"), py::arg("stride_h"), py::arg("patch"), py::arg("where"), NoGil());
}

}  // namespace evaat
