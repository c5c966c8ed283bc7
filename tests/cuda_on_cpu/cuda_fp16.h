#pragma once
#include "common/cpu.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return evaat::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {evaat::float_to_half(x)}; }
