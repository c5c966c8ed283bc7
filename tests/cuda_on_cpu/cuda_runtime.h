// Enough of CUDA to run the .cu files of csrc/ on a CPU: a block is a team of OpenMP threads, blocks follow one another.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

using std::min;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline void __syncthreads() {
#pragma omp barrier
}

namespace evaat {

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, void*, A... arguments) {
  blockDim = block, gridDim = grid;
#pragma omp parallel num_threads(int(block.x * block.y))
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        const unsigned thread = unsigned(omp_get_thread_num());
        threadIdx = dim3(thread % block.x, thread / block.x), blockIdx = dim3(x, y, z);
        kernel(static_cast<P>(arguments)...);
#pragma omp barrier
      }
  return cudaSuccess;
}

}  // namespace evaat
