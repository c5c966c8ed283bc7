// The pairwise losses for Python: structs whose fields are set by name, and the functions that take them.
#pragma once
#include <array>
#include <functional>
#include <type_traits>
#include <vector>

#include "common/bind.h"
#include "pairwise/pairwise.h"

namespace evaat {

// A struct, with what Python made it of, which keeps the memory alive that it points to.
template <class S>
struct Held : S {
  py::object given;
};

template <class M>
void set(M*& to, py::handle from) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  if (from.is_none()) return;
  const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(from.ptr(), name));
  if (!address) throw py::error_already_set();
  to = at<M>(address.cast<Pointer>());
}
template <size_t n>
void set(std::array<int64_t, n>& to, py::handle from) {
  to = from.cast<std::array<int64_t, n>>();
}
template <class M>
void set(M& to, py::handle from) {
  if constexpr (std::is_class_v<M>)
    to = from.cast<const Held<M>&>();
  else
    to = from.cast<M>();
}

// A struct that Python makes with any of its fields as keywords; a pointer is a tensor or None, and what is not named is 0 or null.
// Not by attributes: setting ten of them one by one would take 2 us of a call.
template <class S>
class Fields {
 public:
  using Of = S;

  template <class M>
  Fields& with(const char* name, M S::* member) {
    numbers_[name] = setters_.size();
    setters_.push_back([member](S& s, py::handle value) { set(s.*member, value); });
    return *this;
  }

  Held<S> made(const py::kwargs& given) const {
    Held<S> s{};
    for (const auto& [name, value] : given) {
      PyObject* const number = PyDict_GetItem(numbers_.ptr(), name.ptr());
      if (!number) throw py::attribute_error(py::str(name));
      setters_[PyLong_AsSize_t(number)](s, value);
    }
    s.given = given;
    return s;
  }

 private:
  py::dict numbers_;
  std::vector<std::function<void(S&, py::handle)>> setters_;
};

template <class S, class List>
void bind_struct(py::module_& m, const char* name, List list) {
  Fields<S> fields;
  list(fields);
  py::class_<Held<S>>(m, name, py::module_local()).def(py::init([fields](const py::kwargs& given) { return fields.made(given); }));
}

template <class Step>
void bind_panel(py::module_& m, const char* name, int (*run)(const Step&, Panel, int)) {
  m.def(name,
        [run](const Held<Step>& step, Pointer s, int64_t first, int64_t rows, int threads) {
          return run(step, {at<void>(s), first, rows}, threads);
        },
        NoGil());
}

#define STRUCT(name, fields) bind_struct<name>(m, #name, [](auto& s) { s.fields; })
#define F(field) with(#field, &std::decay_t<decltype(s)>::Of::field)

// What _cpu and _cuda both know of features, labels and penalties.
inline void bind_labels(py::module_& m) {
  m.attr("LABEL_CODES") = kCodes;
  m.attr("SMS_RULES") = py::dict(py::arg("code") = int(kCode), py::arg("paper") = int(kPaper), py::arg("charades") = int(kCharades));
  m.attr("SMS_MODES") = py::dict(py::arg("loss") = int(kLoss), py::arg("slopes") = int(kSlopes), py::arg("each") = int(kEach),
                                 py::arg("weighted") = int(kWeighted));
  STRUCT(PairFeatures, F(dtype).F(wide).F(N).F(E).F(video).F(text).F(video_stride).F(text_stride).F(norms));
  STRUCT(PairLabels, F(table).F(dtype).F(strides).F(video_index).F(caption_index).F(verb).F(values));
  bind_struct<Penalty>(m, "Penalty", [](auto& s) { Penalty::list(s); });
}

inline void bind_pairwise(py::module_& m) {
  bind_labels(m);
  m.attr("MASK_BLOCK") = kMaskBlock;
  STRUCT(SmsStep, F(pairs).F(dtype).F(scales).F(own).F(labels).F(penalty).F(mode).F(weight).F(losses).F(sums));
  STRUCT(PairPositives, F(dense).F(strides).F(verbs).F(nouns).F(verb_words).F(noun_words).F(mask));
  STRUCT(ContrastStep, F(wide).F(N).F(scale).F(positives).F(weight).F(totals).F(row_slope));
  m.def("pair_prepare",
        [](const Held<PairFeatures>& pairs, Pointer unit_video, Pointer unit_text, bool unit_bf16, int threads) {
          return pair_prepare(pairs, at<void>(unit_video), at<void>(unit_text), unit_bf16, threads);
        },
        NoGil());
  m.def("pair_finish",
        [](const Held<PairFeatures>& pairs, bool of_text, Pointer slope, Pointer gradient, double factor, int threads) {
          return pair_finish(pairs, of_text, at<const void>(slope), at<void>(gradient), factor, threads);
        },
        NoGil());
  bind_panel(m, "sms_panel", sms_panel);
  bind_panel(m, "contrast_stats", contrast_stats);
  bind_panel(m, "contrast_slopes", contrast_slopes);
}

#undef F
#undef STRUCT

}  // namespace evaat
