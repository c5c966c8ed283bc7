// The codes of element types: what the Python side calls them is exported by the bindings as DTYPES.
#pragma once

namespace evaat {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

}  // namespace evaat
