// The instructions that C++ has no word for, one function each. The tests have their own of the same names for a CPU
// (tests/cuda_on_cpu/ptx_on_cpu.h), written from the PTX manual.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/launch.h"

#ifndef __CUDACC__
#include "ptx_on_cpu.h"
#else
namespace evaat {

using Shared = uint32_t;  // an address in shared memory

__device__ inline Shared shared_address(const void* at) { return Shared(__cvta_generic_to_shared(at)); }

// threadIdx.x, read again: what is made of it need not stay in registers from one use to the next.
__device__ inline int thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The same of its warp: threadIdx.x % 32 in a block of one dimension.
__device__ inline int thread_of_warp() {
  int x;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(x));
  return x;
}

// Four 8 x 8 matrices of 16-bit elements, whose 16-byte rows are at the addresses that lanes 0-7, 8-15, 16-23 and 24-31 give.
__device__ inline void ldmatrix(uint32_t (&to)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// d = a b + c, of 16 x 16 and 16 x 8 elements of T.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
#define EVAAT_MMA(type)                                                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
      "{%10, %11, %12, %13};"                                                                                   \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))
  if constexpr (sizeof(T) == sizeof(__half) && __is_same(T, __half))
    EVAAT_MMA("f16");
  else
    EVAAT_MMA("bf16");
#undef EVAAT_MMA
}

// 16 bytes to shared memory while the thread goes on; zeros where it is not `inside`, and nothing is read.
__device__ inline void copy_async(Shared to, const void* from, bool inside) {
  asm volatile("{.reg .pred outside; setp.eq.u32 outside, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, outside;}" ::"r"(to),
               "l"(from), "r"(int(inside))
               : "memory");
}
// Closes a group of copies; and waits for all but the last `left` groups of this thread.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// 16 bytes of shared memory, read where it stands: the compiler would keep them in registers all the way from the first use.
__device__ inline void load_shared(float (&to)[4], Shared from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(from));
}
__device__ inline void load_shared(int64_t (&to)[2], Shared from) {
  asm volatile("ld.shared.v2.s64 {%0, %1}, [%2];" : "=l"(to[0]), "=l"(to[1]) : "r"(from));
}
__device__ inline void load_shared(uint32_t (&to)[4], Shared from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}

__device__ inline uint32_t load_byte(const char* from) {  // of memory that does not change
  uint32_t x;
  asm("ld.global.nc.u8 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}
__device__ inline uint32_t load_shared_byte(Shared from) {
  uint32_t x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(from));
  return x;
}
__device__ inline void load_shared(uint32_t (&to)[2], Shared from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from));
}
__device__ inline void store_shared(Shared to, const uint32_t (&x)[2]) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(x[0]), "r"(x[1]) : "memory");
}
__device__ inline uint32_t load_shared(Shared from) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from));
  return x;
}
__device__ inline void store_shared(Shared to, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
__device__ inline void store_global(char* to, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ inline void store_global(char* to, const uint32_t (&x)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x[0]), "r"(x[1]) : "memory");
}

// (x & 0x80008000) | ones
__device__ inline uint32_t signs(uint32_t x, uint32_t ones) {
  uint32_t y;
  asm("lop3.b32 %0, %1, 0x80008000, %2, 0xea;" : "=r"(y) : "r"(x), "r"(ones));
  return y;
}

// Where cost > 0 or NaN, adds it to `loss`, else clears the bits of `slopes` outside of `others`. One block, as the compiler would
// hold the predicates of a whole tile, of which there are seven.
template <uint32_t others>
__device__ inline void count(float cost, float& loss, uint32_t& slopes) {
  asm volatile("{.reg .pred counts; setp.gtu.f32 counts, %2, 0f00000000; @counts add.rn.f32 %0, %0, %2; @!counts and.b32 %1, %1, %3;}"
               : "+f"(loss), "+r"(slopes)
               : "f"(cost), "n"(others));
}

// Two elements of T in 32 bits, the first one low: their sums, and what two floats round to.
template <class T>
__device__ inline uint32_t add2(uint32_t x, uint32_t y) {
  uint32_t sum;
  if constexpr (__is_same(T, __half))
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
  else
    asm("{.reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 %0, %1, one, %2;}" : "=r"(sum) : "r"(x), "r"(y));
  return sum;
}
template <class T>
__device__ inline uint32_t pack2(float first, float second) {
  uint32_t both;
  if constexpr (__is_same(T, __half))
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
template <class T>
__device__ inline float unpack2(uint32_t both, int which) {
  const uint32_t bits = which ? both >> 16 : both & 0xffffu;
  if constexpr (__is_same(T, __half))
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  else
    return __uint_as_float(bits << 16);
}

}  // namespace evaat
#endif
