// The pairwise losses for Python: structs whose fields are set by name, and the functions that take them.
#pragma once
#include <algorithm>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/bind.h"
#include "pairwise/pairwise.h"

namespace evaat {

// A struct that Python makes with any of its fields as keywords; pointers are integers, and what is not named is 0 or null.
// Not by attributes: setting fifteen of them one by one would take 3 us of a call.
template <class S>
class Struct {
 public:
  Struct(py::module_& m, const char* name) : made_(m, name, py::module_local()) {}

  template <class M>
  Struct& with(const char* name, M S::* member) {
    fields_.emplace_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name)), [member](S& s, py::handle value) {
      if constexpr (std::is_pointer_v<M>)
        s.*member = reinterpret_cast<M>(value.cast<Pointer>());
      else
        s.*member = value.cast<M>();
    });
    return *this;
  }

  ~Struct() {
    made_.def(py::init([fields = std::move(fields_)](const py::kwargs& given) {
      S s{};
      for (const auto& [name, value] : given) {
        PyObject* interned = py::object(py::reinterpret_borrow<py::object>(name)).release().ptr();
        PyUnicode_InternInPlace(&interned);  // as keywords that stand in code are
        const auto key = py::reinterpret_steal<py::object>(interned);
        const auto field = std::find_if(fields.begin(), fields.end(), [&](const Field& f) { return f.first.is(key); });
        if (field == fields.end()) throw py::attribute_error(py::str(name));
        field->second(s, value);
      }
      return s;
    }));
  }

 private:
  using Field = std::pair<py::object, std::function<void(S&, py::handle)>>;  // its name, interned
  py::class_<S> made_;
  std::vector<Field> fields_;
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
#define F(field) with(#field, &S::field)
  {
    using S = PairFeatures;
    Struct<S>(m, "PairFeatures").F(dtype).F(wide).F(N).F(E).F(video).F(text).F(video_stride).F(text_stride).F(norm_video)
        .F(norm_text);
  }
  {
    using S = PairLabels;
    Struct<S>(m, "PairLabels").F(table).F(dtype).F(stride_half).F(stride_row).F(stride_col).F(video_index).F(caption_index)
        .F(verb).F(values);
  }
  {
    using S = Penalty;
    Struct<S>(m, "Penalty").F(margin).F(relaxation).F(eps).F(rule);
  }
  {
    using S = SmsStep;
    Struct<S>(m, "SmsStep").F(wide).F(dtype).F(N).F(row_scale).F(col_scale).F(diagonal).F(self).F(labels).F(penalty).F(mode)
        .F(weight).F(row_loss).F(col_loss).F(row_sum).F(col_sum);
  }
  {
    using S = PairPositives;
    Struct<S>(m, "PairPositives").F(dense).F(stride_row).F(stride_col).F(verbs).F(nouns).F(verb_words).F(noun_words).F(mask);
  }
  {
    using S = ContrastStep;
    Struct<S>(m, "ContrastStep").F(wide).F(N).F(scale).F(positives).F(weight).F(totals).F(row_slope);
  }
#undef F
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
