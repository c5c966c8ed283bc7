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

}  // namespace evaat
#endif
