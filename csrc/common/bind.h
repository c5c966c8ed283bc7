// What the bindings of all ops share. Pointers come as integers, and what travels together as a struct made with named fields.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "common/dtype.h"

namespace evaat {

namespace py = pybind11;
using Pointer = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// Where a function runs: a number of threads, or a stream.
inline int place(int threads) { return threads; }
inline void* place(Pointer stream) { return at<void>(stream); }

inline void bind_dtypes(py::module_& m) {
  py::dict codes;
  codes["float32"] = int(kFloat32), codes["bfloat16"] = int(kBFloat16), codes["float16"] = int(kFloat16);
  codes["float64"] = int(kFloat64);
  m.attr("DTYPES") = codes;
}

}  // namespace evaat
