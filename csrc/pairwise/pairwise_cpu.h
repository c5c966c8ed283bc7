// What the CPU kernels of the pairwise losses share.
#pragma once
#include <cmath>

#include "common/cpu.h"
#include "pairwise/pairwise.h"

namespace evaat {

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
