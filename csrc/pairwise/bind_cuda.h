// The max-margin losses of _cuda for Python.
#pragma once
#include "pairwise/bind.h"
#include "pairwise/pairwise_cuda.h"

namespace evaat {

inline void bind_pairwise_cuda(py::module_& m) {
  bind_labels(m);
  m.attr("TILE") = kTile;
  m.attr("ANCHOR_BYTES") = int(sizeof(Anchor));
#define STRUCT(name, fields) bind_struct<name>(m, #name, [](auto& s) { s.fields; })
#define F(field) with(#field, &std::decay_t<decltype(s)>::Of::field)
  STRUCT(SmsGpu, F(pairs).F(labels).F(V).F(C).F(own).F(own_of_all).F(weight).F(videos).F(captions).F(penalty).F(mode).F(row_sum).F(col_sum));
#undef F
#undef STRUCT
  m.def("pair_prepare",
        [](const Held<PairFeatures>& pairs, Pointer unit_video, Pointer unit_text, Pointer where) {
          return pair_prepare_cuda(pairs, at<void>(unit_video), at<void>(unit_text), place(where));
        },
        py::arg("pairs"), py::arg("unit_video"), py::arg("unit_text"), py::arg("where"), NoGil());
  m.def("sms_anchors", [](const Held<SmsGpu>& step, Pointer where) { return sms_anchors_cuda(step, place(where)); }, py::arg("step"),
        py::arg("where"), NoGil());
  m.def("sms_panel",
        [](const Held<SmsGpu>& step, Pointer slopes, int64_t stride, Pointer row_loss, Pointer col_loss, int64_t first, int64_t last,
           Pointer where) {
          return sms_panel_cuda(step, {at<void>(slopes), stride, at<float>(row_loss), at<float>(col_loss), first, last}, place(where));
        },
        py::arg("step"), py::arg("slopes"), py::arg("stride"), py::arg("row_loss"), py::arg("col_loss"), py::arg("first"), py::arg("last"),
        py::arg("where"), NoGil());
  m.def("pair_finish",
        [](const Held<PairFeatures>& pairs, Pointer row_sum, Pointer col_sum, Pointer weight, Pointer grad_video, Pointer grad_text,
           float factor, Pointer where) {
          return pair_finish_cuda(pairs, at<const int32_t>(row_sum), at<const int32_t>(col_sum), at<const float>(weight),
                                  at<float>(grad_video), at<float>(grad_text), factor, place(where));
        },
        py::arg("pairs"), py::arg("row_sum"), py::arg("col_sum"), py::arg("weight"), py::arg("grad_video"), py::arg("grad_text"),
        py::arg("factor"), py::arg("where"), NoGil());
}

}  // namespace evaat
