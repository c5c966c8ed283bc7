// The module evaat_fast._cpu: argument unpacking only. Pointers come as integers; Python has checked everything else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu.h"
#include "pairwise/pairwise.h"
#include "patchify/patchify.h"
#include "rope3d/rope3d.h"

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
  // Each tensor: as above, then the saved tensor's data and its strides of b, h, n.
  m.def("rope3d_freqs", [](int dtype, const std::vector<std::array<int64_t, 13>>& tensors, Pointer cos, Pointer sin, int64_t table_b,
                           int64_t table_h, Pointer positions, int64_t positions_b, Pointer partial, int64_t B, int64_t N, int64_t D,
                           int64_t prefix, bool interleaved, bool inverse, int threads) {
    evaat::RopeTensor grad[2];
    evaat::RopeSaved x[2];
    int count = 0;
    for (const auto& t : tensors) {
      grad[count] = {as<const void>(Pointer(t[0])), as<void>(Pointer(t[1])), t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
      x[count++] = {as<const void>(Pointer(t[9])), t[10], t[11], t[12]};
    }
    int status;
    {
      py::gil_scoped_release release;
      status = evaat::rope3d_freqs(dtype, grad, x, count, {as<const double>(cos), as<const double>(sin), table_b, table_h},
                                   {as<const float>(positions), positions_b}, as<double>(partial), B, N, D, prefix, interleaved, inverse,
                                   threads);
    }
    check(status, "rope3d");
  });
  // Features: (data, row stride) of video and of text. wide: the dtype code of the computation.
  m.def("pair_prepare", [](int dtype, int wide, const std::array<int64_t, 4>& features, int64_t N, int64_t E, Pointer norm_video,
                          Pointer norm_text, Pointer diagonal, Pointer unit_video, Pointer unit_text, bool unit_bf16, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      status = evaat::pair_prepare(dtype, wide, {as<const void>(Pointer(features[0])), features[1]},
                                  {as<const void>(Pointer(features[2])), features[3]}, N, E, as<void>(norm_video), as<void>(norm_text),
                                  as<void>(diagonal), as<void>(unit_video), as<void>(unit_text), unit_bf16, threads);
    }
    check(status, "sms_loss");
  });
  // labels: table, dtype code, the strides of halves, rows and columns, video_index, caption_index, verb, values (0: none).
  // sums: row_loss, col_loss (0: none), row_sum, col_sum.
  m.def("sms_panel", [](int wide, int dtype, Pointer s, int64_t rows, int64_t N, int64_t first, Pointer row_scale, Pointer col_scale,
                        Pointer diagonal, Pointer self, const std::array<int64_t, 9>& labels, double margin, double relaxation,
                        double eps, int rule, int mode, Pointer weight, const std::array<Pointer, 4>& sums, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      const evaat::PairLabels from = {as<const void>(Pointer(labels[0])), int(labels[1]), labels[2], labels[3], labels[4],
                                      as<const int64_t>(Pointer(labels[5])), as<const int64_t>(Pointer(labels[6])),
                                      as<const int64_t>(Pointer(labels[7])), as<const void>(Pointer(labels[8]))};
      status = evaat::sms_panel({wide, dtype, as<void>(s), rows, N, first, as<const void>(row_scale), as<const void>(col_scale),
                                 as<const void>(diagonal), as<const void>(self), from, margin, relaxation, eps, rule, mode,
                                 as<const void>(weight), as<double>(sums[0]), as<double>(sums[1]), as<int32_t>(sums[2]),
                                 as<int32_t>(sums[3])},
                                threads);
    }
    check(status, "sms_loss");
  });
  m.def("pair_finish", [](int dtype, int wide, const std::array<int64_t, 4>& features, Pointer norm_x, Pointer norm_other, Pointer slope,
                         Pointer gradient, double factor, int64_t N, int64_t E, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      status = evaat::pair_finish(dtype, wide, {as<const void>(Pointer(features[0])), features[1]}, as<const void>(norm_x),
                                 {as<const void>(Pointer(features[2])), features[3]}, as<const void>(norm_other),
                                 as<const void>(slope), as<void>(gradient), factor, N, E, threads);
    }
    check(status, "sms_loss");
  });
  // positives: dense, its strides, verbs, nouns, their words, mask. vectors: weight (0: none), then the largest and the sum of row,
  // column, positive row and positive column, then row_slope. slopes: the second sweep.
  m.def("contrast_panel", [](bool slopes, int wide, Pointer s, int64_t rows, int64_t N, int64_t first, double scale,
                             const std::array<int64_t, 8>& positives, const std::array<Pointer, 10>& vectors, int threads) {
    int status;
    {
      py::gil_scoped_release release;
      const auto total = [&](int i) { return evaat::LogSumExp{as<double>(vectors[i]), as<double>(vectors[i + 1])}; };
      const evaat::PairPositives from = {as<const uint8_t>(Pointer(positives[0])), positives[1], positives[2],
                                         as<const int32_t>(Pointer(positives[3])), as<const int32_t>(Pointer(positives[4])),
                                         positives[5], positives[6]};
      const evaat::ContrastPanel panel = {wide, as<void>(s), rows, N, first, scale, from, as<uint8_t>(Pointer(positives[7])),
                                          as<const double>(vectors[0]), total(1), total(3), total(5), total(7), as<double>(vectors[9])};
      status = slopes ? evaat::contrast_slopes(panel, threads) : evaat::contrast_stats(panel, threads);
    }
    check(status, "contrast");
  });
}
