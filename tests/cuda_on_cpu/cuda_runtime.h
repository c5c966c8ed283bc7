// Enough of CUDA to run the .cu files of csrc/ on a CPU: the threads of a block are coroutines of one thread, which go on in turn
// where they wait for each other, and blocks follow one another.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

namespace evaat::emulator {

// Those that wait for each other; `come` counts them, and the last one ends a turn.
struct Meeting {
  unsigned come = 0, turn = 0;
};
struct Copy {
  char* to;
  const void* from;
  bool inside;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  std::vector<std::vector<Copy>> copies;  // groups that are closed, and the one that is not
};
constexpr size_t kStack = 128 << 10, kMostShared = 227 << 10;

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline Meeting block;
inline unsigned index;  // of the thread that runs
inline bool moved;  // whether anything happened in this round
alignas(1024) inline char pool[kMostShared];

inline Thread& current() { return threads[index]; }
inline void pause() { swapcontext(&current().context, &scheduler); }

// Waits until `all` have come; the last one calls `last` before any goes on.
template <class Last>
void meet(Meeting& meeting, unsigned all, Last last) {
  const unsigned turn = meeting.turn;
  if (++meeting.come == all) {
    last();
    meeting.come = 0, ++meeting.turn, moved = true;
  } else {
    while (meeting.turn == turn) pause();
  }
}

inline void enter() {
  body();
  current().done = moved = true;
  pause();
}

inline void run_block(unsigned count) {
  if (threads.size() < count) threads.resize(count);
  block = {};
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = kStack;
    thread.done = false, thread.copies.assign(1, {});
    makecontext(&thread.context, enter, 0);
  }
  for (unsigned left = count; left;) {
    moved = false;
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i].done) continue;
      index = i, threadIdx = dim3(i % blockDim.x, i / blockDim.x);
      swapcontext(&scheduler, &threads[i].context);
      left -= threads[i].done;
    }
    if (!moved) std::fputs("cuda_on_cpu: threads wait for others that never come\n", stderr), std::abort();
  }
}

}  // namespace evaat::emulator

inline void __syncthreads() {
  evaat::emulator::meet(evaat::emulator::block, blockDim.x * blockDim.y, [] {});
}

namespace evaat {

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, void*, A... arguments) {
  blockDim = block, gridDim = grid;
  emulator::body = [=] { kernel(static_cast<P>(arguments)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(emulator::pool, 0xff, sizeof emulator::pool);  // NaN, as what nobody wrote
        blockIdx = dim3(x, y, z);
        emulator::run_block(block.x * block.y);
      }
  return cudaSuccess;
}

template <class... P, class... A>
int launch_with(int bytes, void (*kernel)(P...), dim3 grid, dim3 block, void* stream, A... arguments) {
  return size_t(bytes) > emulator::kMostShared ? int(cudaErrorInvalidValue) : launch(kernel, grid, block, stream, arguments...);
}

inline char* dynamic_shared() { return emulator::pool; }
inline int multiprocessors() { return 1; }

}  // namespace evaat

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int atomicAdd(int* to, int x) {
  const int before = *to;
  *to += x;
  return before;
}
// Byte i of the result is the byte of y:x that the i-th digit of the selector names.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
[[noreturn]] inline void __trap() { std::abort(); }
