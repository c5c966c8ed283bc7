// Picks the instruction set once per process. EVAAT_FAST_CPU_ISA=plain|avx2|avx512 lowers it, for tests and comparisons.
#include "common/cpu.h"

#include <atomic>
#include <cstdlib>

namespace evaat {
namespace {

int machine() {
#ifdef EVAAT_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kPlain;
#else
  return kPlain;
#endif
}

int initial() {
  const char* wish = std::getenv("EVAAT_FAST_CPU_ISA");
  int best = machine(), level = best;
  if (wish && !std::strcmp(wish, "plain")) level = kPlain;
  if (wish && !std::strcmp(wish, "avx2")) level = kAvx2;
  return level < best ? level : best;
}

std::atomic<int>& current() {
  static std::atomic<int> level{initial()};
  return level;
}

}  // namespace

int isa() { return current().load(std::memory_order_relaxed); }

int set_isa(int level) {
  int best = machine();
  current().store(level < 0 ? kPlain : level < best ? level : best);
  return isa();
}

}  // namespace evaat
