// The pairwise losses for Python: argument unpacking only.
#pragma once
#include <array>

#include "common/bind.h"
#include "common/cpu.h"
#include "pairwise/pairwise.h"

namespace evaat {

inline void bind_pairwise(py::module_& m) {
  const auto check = [](int status, const char* op) {
    if (status == kBadDtype) throw py::type_error(std::string(op) + ": dtype not supported by the cpu backend");
  };
  // Features: (data, row stride) of video and of text. wide: the dtype code of the computation.
  m.def("pair_prepare", [check](int dtype, int wide, const std::array<int64_t, 4>& features, int64_t N, int64_t E, Pointer norm_video,
                          Pointer norm_text, Pointer diagonal, Pointer unit_video, Pointer unit_text, bool unit_bf16, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      status = pair_prepare(dtype, wide, {at<const void>(Pointer(features[0])), features[1]},
                                  {at<const void>(Pointer(features[2])), features[3]}, N, E, at<void>(norm_video), at<void>(norm_text),
                                  at<void>(diagonal), at<void>(unit_video), at<void>(unit_text), unit_bf16, threads);
    }
    check(status, "sms_loss");
  });
  // labels: table, dtype code, the strides of halves, rows and columns, video_index, caption_index, verb, values (0: none).
  // sums: row_loss, col_loss (0: none), row_sum, col_sum.
  m.def("sms_panel", [check](int wide, int dtype, Pointer s, int64_t rows, int64_t N, int64_t first, Pointer row_scale, Pointer col_scale,
                        Pointer diagonal, Pointer self, const std::array<int64_t, 9>& labels, double margin, double relaxation,
                        double eps, int rule, int mode, Pointer weight, const std::array<Pointer, 4>& sums, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      const PairLabels from = {at<const void>(Pointer(labels[0])), int(labels[1]), labels[2], labels[3], labels[4],
                                      at<const int64_t>(Pointer(labels[5])), at<const int64_t>(Pointer(labels[6])),
                                      at<const int64_t>(Pointer(labels[7])), at<const void>(Pointer(labels[8]))};
      status = sms_panel({wide, dtype, at<void>(s), rows, N, first, at<const void>(row_scale), at<const void>(col_scale),
                                 at<const void>(diagonal), at<const void>(self), from, margin, relaxation, eps, rule, mode,
                                 at<const void>(weight), at<double>(sums[0]), at<double>(sums[1]), at<int32_t>(sums[2]),
                                 at<int32_t>(sums[3])},
                                threads);
    }
    check(status, "sms_loss");
  });
  m.def("pair_finish", [check](int dtype, int wide, const std::array<int64_t, 4>& features, Pointer norm_x, Pointer norm_other, Pointer slope,
                         Pointer gradient, double factor, int64_t N, int64_t E, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      status = pair_finish(dtype, wide, {at<const void>(Pointer(features[0])), features[1]}, at<const void>(norm_x),
                                 {at<const void>(Pointer(features[2])), features[3]}, at<const void>(norm_other),
                                 at<const void>(slope), at<void>(gradient), factor, N, E, threads);
    }
    check(status, "sms_loss");
  });
  // positives: dense, its strides, verbs, nouns, their words, mask. vectors: weight (0: none), then the largest and the sum of row,
  // column, positive row and positive column, then row_slope. slopes: the second sweep.
  m.def("contrast_panel", [check](bool slopes, int wide, Pointer s, int64_t rows, int64_t N, int64_t first, double scale,
                             const std::array<int64_t, 8>& positives, const std::array<Pointer, 10>& vectors, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      const auto total = [&](int i) { return LogSumExp{at<double>(vectors[i]), at<double>(vectors[i + 1])}; };
      const PairPositives from = {at<const uint8_t>(Pointer(positives[0])), positives[1], positives[2],
                                         at<const int32_t>(Pointer(positives[3])), at<const int32_t>(Pointer(positives[4])),
                                         positives[5], positives[6]};
      const ContrastPanel panel = {wide, at<void>(s), rows, N, first, scale, from, at<uint8_t>(Pointer(positives[7])),
                                          at<const double>(vectors[0]), total(1), total(3), total(5), total(7), at<double>(vectors[9])};
      status = slopes ? contrast_slopes(panel, threads) : contrast_stats(panel, threads);
    }
    check(status, "contrast");
  });
}

}  // namespace evaat
