// exp as a polynomial that the compiler vectorises: libm's would take longer than what it serves.
#pragma once
#include "common/cpu.h"

namespace evaat {

// What exp_within takes of a type. least: below it the result stays at the smallest normal number; rounder: 1.5 * 2^mantissa,
// which rounds to an integer; high + low = log(2). tail(r): the series of exp from its third term on.
template <class T>
struct Exp;

template <>
struct Exp<float> {
  using Bits = uint32_t;
  static constexpr Bits rounder_bits = 0x4b400000, bias = 127, mantissa = 23;
  static constexpr float least = -87.0f, rounder = 12582912.0f, log2_e = 1.44269504f, high = 0.693359375f, low = -2.12194440e-4f;
  static EVAAT_INLINE float tail(float r) {
    return ((((1.0f / 5040 * r + 1.0f / 720) * r + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f;
  }
};

template <>
struct Exp<double> {
  using Bits = uint64_t;
  static constexpr Bits rounder_bits = 0x4338000000000000, bias = 1023, mantissa = 52;
  static constexpr double least = -708.0, rounder = 6755399441055744.0, log2_e = 1.4426950408889634;
  static constexpr double high = 6.93147180369123816490e-01, low = 1.90821492927058770002e-10;
  static EVAAT_INLINE double tail(double r) {
    const double far = (((1.0 / 6227020800 * r + 1.0 / 479001600) * r + 1.0 / 39916800) * r + 1.0 / 3628800) * r + 1.0 / 362880;
    return ((((((far * r + 1.0 / 40320) * r + 1.0 / 5040) * r + 1.0 / 720) * r + 1.0 / 120) * r + 1.0 / 24) * r + 1.0 / 6) * r + 0.5;
  }
};

// exp(x) for x <= -least, to 2 units in the last place.
template <class T>
EVAAT_INLINE T exp_within(T x) {
  using E = Exp<T>;
  x = x < E::least ? E::least : x;  // NaN stays NaN
  const T shifted = x * E::log2_e + E::rounder, n = shifted - E::rounder, r = (x - n * E::high) - n * E::low;
  const T p = E::tail(r) * r * r + r + T(1);
  return p * bits_as<T>((bits_as<typename E::Bits>(shifted) - E::rounder_bits + E::bias) << E::mantissa);
}

}  // namespace evaat
