// One way to launch a kernel. The tests compile the .cu files for the CPU with a cuda_runtime.h of their own, which has another.
#pragma once
#include <cuda_runtime.h>

#ifdef __CUDACC__
namespace evaat {

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, void* stream, A... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  return int(cudaGetLastError());
}

// With so many bytes of dynamic shared memory, which the kernel finds through dynamic_shared(). The most shared memory is asked for,
// as otherwise the driver may leave room for one block where two would fit.
template <class... P, class... A>
int launch_with(int bytes, void (*kernel)(P...), dim3 grid, dim3 block, void* stream, A... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return int(error);
  kernel<<<grid, block, size_t(bytes), static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  return int(cudaGetLastError());
}

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char evaat_pool[];
  return evaat_pool;
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace evaat
#endif
