// What the CUDA kernels of rope3d share: pairs of channels as float32, read and written in accesses of up to 16 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.h"
#include "rope3d/rope3d.h"

namespace evaat {
namespace rope {

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }

// (a, b) by an angle: the specification of every kernel.
__device__ inline void turn_pair(float a, float b, float cos, float sin, float& new_a, float& new_b) {
  new_a = a * cos - b * sin;
  new_b = b * cos + a * sin;
}

template <class T, int n>
struct alignas(sizeof(T) * n) Vector {
  T at[n];
};

// P pairs as they lie in memory: one vector of both channels, or one of each.
template <class T, bool interleaved, int P>
struct Pairs {
  Vector<T, interleaved ? 2 * P : P> x;
  Vector<T, interleaved ? 1 : P> y;

  __device__ inline void load(const T* row, int64_t pairs, int c) {
    x = *reinterpret_cast<const decltype(x)*>(row + (interleaved ? 2 * c : c));
    if constexpr (!interleaved) y = *reinterpret_cast<const decltype(y)*>(row + pairs + c);
  }
  __device__ inline float a(int i) const { return wide(x.at[interleaved ? 2 * i : i]); }
  __device__ inline float b(int i) const {
    if constexpr (interleaved)
      return wide(x.at[2 * i + 1]);
    else
      return wide(y.at[i]);
  }
};

template <class T, bool interleaved, int P>
__device__ inline void store(T* row, int64_t pairs, int c, const float (&a)[P], const float (&b)[P]) {
  if constexpr (interleaved) {
    Vector<T, 2 * P> x;
#pragma unroll
    for (int i = 0; i < P; ++i) narrow(a[i], x.at[2 * i]), narrow(b[i], x.at[2 * i + 1]);
    *reinterpret_cast<Vector<T, 2 * P>*>(row + 2 * c) = x;
  } else {
    Vector<T, P> x, y;
#pragma unroll
    for (int i = 0; i < P; ++i) narrow(a[i], x.at[i]), narrow(b[i], y.at[i]);
    *reinterpret_cast<Vector<T, P>*>(row + c) = x, *reinterpret_cast<Vector<T, P>*>(row + pairs + c) = y;
  }
}

template <class S, int P>
__device__ inline void load_table(const S* from, S (&to)[P]) {
  constexpr int step = 16 / sizeof(S) < P ? 16 / sizeof(S) : P;
#pragma unroll
  for (int i = 0; i < P; i += step) {
    const auto x = *reinterpret_cast<const Vector<S, step>*>(from + i);
#pragma unroll
    for (int j = 0; j < step; ++j) to[i + j] = x.at[j];
  }
}

// P pairs make one access where this holds: 16 bytes for interleaved pairs, and for each half of the others.
template <class T>
constexpr int pairs_of(bool interleaved) {
  return interleaved ? 8 / int(sizeof(T)) : 16 / int(sizeof(T));
}

inline bool aligned(const void* p, int64_t size, int64_t b, int64_t h, int64_t n) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && b * size % 16 == 0 && h * size % 16 == 0 && n * size % 16 == 0;
}

inline bool aligned(const RopeTensor& x, int64_t size) {
  return aligned(x.in, size, x.in_b, x.in_h, x.in_n) && aligned(x.out, size, x.out_b, x.out_h, x.out_n);
}

}  // namespace rope
}  // namespace evaat
