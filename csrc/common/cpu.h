// What the CPU kernels share: element types, the instruction set chosen at run time, threads, and 16-bit float conversion.
#pragma once
#include <algorithm>
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
#if defined(__clang__)
#define EVAAT_FUSED
#else
#define EVAAT_FUSED __attribute__((optimize("fp-contract=fast")))
#endif
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

#ifdef EVAAT_X86
template <class Body, class... Arguments>
EVAAT_AVX512 void run_avx512(Arguments... arguments) {
  Body::run(arguments...);
}
template <class Body, class... Arguments>
EVAAT_AVX2 void run_avx2(Arguments... arguments) {
  Body::run(arguments...);
}
template <class Body, class... Arguments>
EVAAT_AVX512 EVAAT_FUSED void fused_avx512(Arguments... arguments) {
  Body::run(arguments...);
}
template <class Body, class... Arguments>
EVAAT_AVX2 EVAAT_FUSED void fused_avx2(Arguments... arguments) {
  Body::run(arguments...);
}
#endif

// Runs Body::run, an always-inlined static function that the compiler vectorises once for each instruction set. fused: the sum of
// a product may be rounded once.
template <class Body, bool fused = false, class... Arguments>
void run_best(Arguments... arguments) {
#ifdef EVAAT_X86
  if (isa() == kAvx512) return fused ? fused_avx512<Body>(arguments...) : run_avx512<Body>(arguments...);
  if (isa() == kAvx2) return fused ? fused_avx2<Body>(arguments...) : run_avx2<Body>(arguments...);
#endif
  Body::run(arguments...);
}

// How many threads a call that moves so many bytes should use: below some 32 KB each, waking one costs more than it saves.
inline int useful(int threads, int64_t bytes) { return int(std::max<int64_t>(1, std::min<int64_t>(threads, bytes >> 15))); }

// Conversions choose between numbers and not between ways, so that loops of them vectorise.
template <class To, class From>
EVAAT_INLINE To bits_as(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

EVAAT_INLINE float bf16_to_float(uint16_t x) { return bits_as<float>(uint32_t(x) << 16); }

EVAAT_INLINE uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = bits_as<uint32_t>(f), nan = (bits >> 16) | 0x40u, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

EVAAT_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);
  const uint32_t small = bits_as<uint32_t>(float(int32_t(magnitude)) * 5.9604644775390625e-8f);  // a multiple of 2^-24
  return bits_as<float>(uint32_t(h & 0x8000u) << 16 | (magnitude < 0x400u ? small : normal));
}

EVAAT_INLINE uint16_t float_to_half(float f) {  // round to nearest even
  const uint32_t bits = bits_as<uint32_t>(f), magnitude = bits & 0x7fffffffu, odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;  // the adder rounds to 2^-24
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t((bits >> 16 & 0x8000u) | half);
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
