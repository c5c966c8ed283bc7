// What the CPU kernels share: element types, the instruction set chosen at run time, and 16-bit float conversion.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__GNUC__)
#define EVAAT_INLINE inline __attribute__((always_inline))
#else
#define EVAAT_INLINE inline
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define EVAAT_X86 1
#define EVAAT_AVX2 __attribute__((target("avx2,fma,f16c")))
#define EVAAT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
// NAME_avx512, NAME_avx2 or NAME_plain with these template arguments, as isa() says.
#define EVAAT_BEST(NAME, ...) \
  (isa() == kAvx512 ? NAME##_avx512<__VA_ARGS__> : isa() == kAvx2 ? NAME##_avx2<__VA_ARGS__> : NAME##_plain<__VA_ARGS__>)
#else
#define EVAAT_BEST(NAME, ...) NAME##_plain<__VA_ARGS__>
#endif

namespace evaat {

enum Isa : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The best level this machine has, or a lower one set through EVAAT_FAST_CPU_ISA or set_isa.
int isa();
// Returns the level now in force, which is never above what the machine has.
int set_isa(int level);

enum Status : int { kOk = 0, kBadDtype = 1 };

inline float bf16_to_float(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero or subnormal: the value is mantissa * 2^-24, exact in float
    float f = float(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                                 // below 2^-14: let the adder round to a multiple of 2^-24
    float value, shift = 0.5f;
    std::memcpy(&value, &magnitude, 4);
    value += shift;
    uint32_t rounded;
    std::memcpy(&rounded, &value, 4);
    return uint16_t(sign | (rounded - 0x3f000000u));
  }
  uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

// Elements of tensors, and how they become floats and back.
struct BFloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

EVAAT_INLINE float widen(float x) { return x; }
EVAAT_INLINE double widen(double x) { return x; }
EVAAT_INLINE float widen(BFloat x) { return bf16_to_float(x.bits); }
EVAAT_INLINE float widen(Half x) { return half_to_float(x.bits); }
EVAAT_INLINE void narrow(float& to, float x) { to = x; }
EVAAT_INLINE void narrow(double& to, double x) { to = x; }
EVAAT_INLINE void narrow(BFloat& to, float x) { to.bits = float_to_bf16(x); }
EVAAT_INLINE void narrow(Half& to, float x) { to.bits = float_to_half(x); }

}  // namespace evaat
