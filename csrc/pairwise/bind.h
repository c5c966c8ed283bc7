// The pairwise losses for Python: structs whose fields are set by name, and the functions that take them.
#pragma once
#include <type_traits>

#include "common/bind.h"
#include "pairwise/pairwise.h"

namespace evaat {

// A struct that Python makes with any of its fields as keywords; pointers are integers, and what is not named is 0 or null.
template <class S>
class Struct : public py::class_<S> {
 public:
  Struct(py::module_& m, const char* name) : py::class_<S>(m, name, py::module_local()) {
    this->def(py::init([](const py::kwargs& fields) {
      S made{};
      const py::object object = py::cast(&made, py::return_value_policy::reference);
      for (const auto& [name, value] : fields) py::setattr(object, name, value);
      return made;
    }));
  }
  template <class M>
  Struct& with(const char* name, M S::* member) {
    if constexpr (std::is_pointer_v<M>)
      this->def_property(name, [member](const S& s) { return Pointer(s.*member); },
                         [member](S& s, Pointer p) { s.*member = reinterpret_cast<M>(p); });
    else
      this->def_readwrite(name, member);
    return *this;
  }
};

template <class Step>
void bind_panel(py::module_& m, const char* name, int (*run)(const Step&, Panel, int)) {
  m.def(name,
        [run](const Step& step, Pointer s, int64_t first, int64_t rows, int threads) {
          return run(step, {at<void>(s), first, rows}, threads);
        },
        py::arg("step"), py::arg("s"), py::arg("first"), py::arg("rows"), py::arg("threads"), NoGil());
}

inline void bind_pairwise(py::module_& m) {
  m.attr("LABEL_CODES") = kCodes;
  m.attr("MASK_BLOCK") = kMaskBlock;
  m.attr("SMS_RULES") = py::dict(py::arg("code") = int(kCode), py::arg("paper") = int(kPaper), py::arg("charades") = int(kCharades));
  m.attr("SMS_MODES") = py::dict(py::arg("loss") = int(kLoss), py::arg("slopes") = int(kSlopes), py::arg("each") = int(kEach),
                                 py::arg("weighted") = int(kWeighted));
  Struct<PairFeatures>(m, "PairFeatures")
      .with("dtype", &PairFeatures::dtype).with("wide", &PairFeatures::wide).with("N", &PairFeatures::N).with("E", &PairFeatures::E)
      .with("video", &PairFeatures::video).with("text", &PairFeatures::text).with("video_stride", &PairFeatures::video_stride)
      .with("text_stride", &PairFeatures::text_stride).with("norm_video", &PairFeatures::norm_video)
      .with("norm_text", &PairFeatures::norm_text);
  Struct<PairLabels>(m, "PairLabels")
      .with("table", &PairLabels::table).with("dtype", &PairLabels::dtype).with("stride_half", &PairLabels::stride_half)
      .with("stride_row", &PairLabels::stride_row).with("stride_col", &PairLabels::stride_col)
      .with("video_index", &PairLabels::video_index).with("caption_index", &PairLabels::caption_index).with("verb", &PairLabels::verb)
      .with("values", &PairLabels::values);
  Struct<Penalty>(m, "Penalty")
      .with("margin", &Penalty::margin).with("relaxation", &Penalty::relaxation).with("eps", &Penalty::eps).with("rule", &Penalty::rule);
  Struct<SmsStep>(m, "SmsStep")
      .with("wide", &SmsStep::wide).with("dtype", &SmsStep::dtype).with("N", &SmsStep::N).with("row_scale", &SmsStep::row_scale)
      .with("col_scale", &SmsStep::col_scale).with("diagonal", &SmsStep::diagonal).with("self", &SmsStep::self)
      .with("labels", &SmsStep::labels).with("penalty", &SmsStep::penalty).with("mode", &SmsStep::mode).with("weight", &SmsStep::weight)
      .with("row_loss", &SmsStep::row_loss).with("col_loss", &SmsStep::col_loss).with("row_sum", &SmsStep::row_sum)
      .with("col_sum", &SmsStep::col_sum);
  Struct<PairPositives>(m, "PairPositives")
      .with("dense", &PairPositives::dense).with("stride_row", &PairPositives::stride_row)
      .with("stride_col", &PairPositives::stride_col).with("verbs", &PairPositives::verbs).with("nouns", &PairPositives::nouns)
      .with("verb_words", &PairPositives::verb_words).with("noun_words", &PairPositives::noun_words)
      .with("mask", &PairPositives::mask);
  Struct<LogSumExp>(m, "LogSumExp").with("largest", &LogSumExp::largest).with("sum", &LogSumExp::sum);
  Struct<ContrastStep>(m, "ContrastStep")
      .with("wide", &ContrastStep::wide).with("N", &ContrastStep::N).with("scale", &ContrastStep::scale)
      .with("positives", &ContrastStep::positives).with("weight", &ContrastStep::weight).with("row", &ContrastStep::row)
      .with("column", &ContrastStep::column).with("positive_row", &ContrastStep::positive_row)
      .with("positive_column", &ContrastStep::positive_column).with("row_slope", &ContrastStep::row_slope);
  m.def("pair_prepare",
        [](const PairFeatures& pairs, Pointer diagonal, Pointer unit_video, Pointer unit_text, bool unit_bf16, int threads) {
          return pair_prepare(pairs, at<void>(diagonal), at<void>(unit_video), at<void>(unit_text), unit_bf16, threads);
        },
        py::arg("pairs"), py::arg("diagonal"), py::arg("unit_video"), py::arg("unit_text"), py::arg("unit_bf16"), py::arg("threads"), NoGil());
  m.def("pair_finish",
        [](const PairFeatures& pairs, bool of_text, Pointer slope, Pointer gradient, double factor, int threads) {
          return pair_finish(pairs, of_text, at<const void>(slope), at<void>(gradient), factor, threads);
        },
        py::arg("pairs"), py::arg("of_text"), py::arg("slope"), py::arg("gradient"), py::arg("factor"), py::arg("threads"), NoGil());
  bind_panel(m, "sms_panel", sms_panel);
  bind_panel(m, "contrast_stats", contrast_stats);
  bind_panel(m, "contrast_slopes", contrast_slopes);
}

}  // namespace evaat
