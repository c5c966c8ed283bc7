// What the CPU kernels of the pairwise losses share.
#pragma once
#include <cmath>

#include "common/cpu.h"
#include "pairwise/pairwise.h"

#if defined(__GNUC__)
#define EVAAT_INLINE inline __attribute__((always_inline))
#else
#define EVAAT_INLINE inline
#endif

namespace evaat {

struct BFloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

EVAAT_INLINE float widen(float x) { return x; }
EVAAT_INLINE double widen(double x) { return x; }
EVAAT_INLINE float widen(BFloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
EVAAT_INLINE float widen(Half x) { return half_to_float(x.bits); }
EVAAT_INLINE void narrow(float& to, float x) { to = x; }
EVAAT_INLINE void narrow(double& to, double x) { to = x; }
EVAAT_INLINE void narrow(BFloat& to, float x) { to.bits = float_to_bf16(x); }

#ifdef EVAAT_X86
template <class Body, class... Arguments>
EVAAT_AVX512 void run_avx512(Arguments... arguments) {
  Body::run(arguments...);
}
template <class Body, class... Arguments>
EVAAT_AVX2 void run_avx2(Arguments... arguments) {
  Body::run(arguments...);
}
#endif

// Runs Body::run, an always-inlined static function that the compiler vectorises once for each instruction set.
template <class Body, class... Arguments>
void run_best(Arguments... arguments) {
#ifdef EVAAT_X86
  if (isa() == kAvx512) return run_avx512<Body>(arguments...);
  if (isa() == kAvx2) return run_avx2<Body>(arguments...);
#endif
  Body::run(arguments...);
}

}  // namespace evaat
