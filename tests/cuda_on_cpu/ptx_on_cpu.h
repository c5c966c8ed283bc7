// What csrc/common/ptx.h wraps, for a CPU. Which element lies in which register of which lane is written from the PTX manual: sections
// "Matrix fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
#pragma once
#include <type_traits>

#include "common/cpu.h"

namespace evaat {

using Shared = uintptr_t;
inline Shared shared_address(const void* at) { return reinterpret_cast<Shared>(at); }

namespace emulator {

struct Warp {
  Meeting meeting;
  alignas(16) char given[32][64], got[32][64];
};
inline Warp warps[32];

// What all lanes of a warp do at once: compute(what each gave, what each gets).
template <class Got, class Given, class Compute>
Got together(const Given& given, Compute compute) {
  static_assert(sizeof(Given) <= 64 && sizeof(Got) <= 64);
  Warp& warp = warps[threadIdx.x / 32];
  const int lane = int(threadIdx.x % 32);
  std::memcpy(warp.given[lane], &given, sizeof given);
  meet(warp.meeting, 32, [&] {
    Given all[32];
    Got results[32] = {};
    for (int i = 0; i < 32; ++i) std::memcpy(&all[i], warp.given[i], sizeof(Given));
    compute(all, results);
    for (int i = 0; i < 32; ++i) std::memcpy(warp.got[i], &results[i], sizeof(Got));
  });
  Got got;
  std::memcpy(&got, warp.got[lane], sizeof got);
  return got;
}

template <class X, size_t n>
struct Registers {
  X x[n];
};

template <class T>
float widened(uint32_t two, int which) {
  const uint16_t bits = uint16_t(which ? two >> 16 : two);
  return std::is_same_v<T, __half> ? half_to_float(bits) : bf16_to_float(bits);
}
template <class T>
uint32_t narrowed(float x) {
  return std::is_same_v<T, __half> ? float_to_half(x) : float_to_bf16(x);
}

}  // namespace emulator

inline int thread() { return int(threadIdx.x); }
inline int thread_of_warp() { return int(threadIdx.x % 32); }

// Lane l gets of each matrix elements 2 (l % 4) and the next of row l / 4.
inline void ldmatrix(uint32_t (&to)[4], Shared row) {
  using Four = emulator::Registers<uint32_t, 4>;
  const Four got = emulator::together<Four>(row, [](const Shared* rows, Four* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Shared from = rows[8 * matrix + lane / 4];
        if (from % 16) std::abort();
        std::memcpy(&out[lane].x[matrix], reinterpret_cast<const char*>(from) + 4 * (lane % 4), 4);
      }
  });
  std::memcpy(to, got.x, sizeof got.x);
}

// With group = lane / 4 and t = lane % 4: element i of a (two a register) is of row group, + 8 for i in {2, 3, 6, 7}, and column 2 t + i % 2,
// + 8 for i >= 4; of b of row 2 t + i % 2, + 8 for i >= 2, and column group; of c and d of row group, + 8 for i >= 2, and column
// 2 t + i % 2. The sums of one instruction are rounded once here; a GPU's are exact to within the float32 they end in.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  using Given = emulator::Registers<uint32_t, 10>;
  using Four = emulator::Registers<float, 4>;
  Given given = {{a[0], a[1], a[2], a[3], b0, b1}};
  std::memcpy(given.x + 6, c, 16);
  const Four got = emulator::together<Four>(given, [](const Given* all, Four* out) {
    float left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i)
        left[group + (i & 2 ? 8 : 0)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] = emulator::widened<T>(all[lane].x[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) {
        right[2 * t + i % 2 + (i >= 2 ? 8 : 0)][group] = emulator::widened<T>(all[lane].x[4 + i / 2], i % 2);
        std::memcpy(&sum[group + (i >= 2 ? 8 : 0)][2 * t + i % 2], &all[lane].x[6 + i], 4);
      }
    }
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        double total = sum[m][n];
        for (int k = 0; k < 16; ++k) total += double(left[m][k]) * right[k][n];
        sum[m][n] = float(total);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) out[lane].x[i] = sum[lane / 4 + (i >= 2 ? 8 : 0)][2 * (lane % 4) + i % 2];
  });
  std::memcpy(d, got.x, 16);
}

// Copies arrive when they are waited for, and not before.
inline void copy_async(Shared to, const void* from, bool inside) {
  if (to % 16 || (inside && reinterpret_cast<uintptr_t>(from) % 16)) std::abort();
  emulator::current().copies.back().push_back({reinterpret_cast<char*>(to), from, inside});
}
inline void copy_async_commit() { emulator::current().copies.emplace_back(); }
template <int left>
void copy_async_wait() {
  auto& groups = emulator::current().copies;
  while (int(groups.size()) - 1 > left) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.inside) std::memcpy(copy.to, copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

template <class X, size_t n>
void load_shared(X (&to)[n], Shared from) {
  if (from % sizeof to) std::abort();
  std::memcpy(to, reinterpret_cast<const void*>(from), sizeof to);
}
inline uint32_t load_shared(Shared from) {
  uint32_t x;
  std::memcpy(&x, reinterpret_cast<const void*>(from), 4);
  return x;
}
inline uint32_t load_shared_byte(Shared from) { return *reinterpret_cast<const uint8_t*>(from); }
inline uint32_t load_byte(const char* from) { return *reinterpret_cast<const uint8_t*>(from); }
template <class X, size_t n>
void store_shared(Shared to, const X (&x)[n]) {
  if (to % sizeof x) std::abort();
  std::memcpy(reinterpret_cast<void*>(to), x, sizeof x);
}
template <size_t n>
void store_global(char* to, const uint32_t (&x)[n]) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof x) std::abort();
  std::memcpy(to, x, sizeof x);
}

inline uint32_t signs(uint32_t x, uint32_t ones) { return (x & 0x80008000u) | ones; }
template <uint32_t others>
void count(float cost, float& loss, uint32_t& slopes) {
  if (cost <= 0.0f)
    slopes &= others;
  else
    loss += cost;
}

template <class T>
float unpack2(uint32_t both, int which) {
  return emulator::widened<T>(both, which);
}
template <class T>
uint32_t pack2(float first, float second) {
  return emulator::narrowed<T>(first) | emulator::narrowed<T>(second) << 16;
}
template <class T>
uint32_t add2(uint32_t x, uint32_t y) {
  return pack2<T>(unpack2<T>(x, 0) + unpack2<T>(y, 0), unpack2<T>(x, 1) + unpack2<T>(y, 1));
}

}  // namespace evaat

template <class X>
X __shfl_xor_sync(unsigned, X x, int mask) {
  return evaat::emulator::together<X>(x, [mask](const X* all, X* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = all[lane ^ mask];
  });
}
