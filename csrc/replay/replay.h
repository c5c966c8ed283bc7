// Kernels that a driver has loaded, launched again with other addresses in their parameters. No header of CUDA is needed: the
// driver's cuLaunchKernel comes as an address.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace evaat {

// CUresult cuLaunchKernel(CUfunction, grid x y z, block x y z, bytes of shared memory, CUstream, parameters, extra).
using LaunchKernel = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

// A parameter that is an address: that of a tensor, and so many bytes further.
struct Address {
  uint32_t parameter, tensor;
  uint64_t offset;
};

// values: one for each parameter, in its lowest bytes; those of addresses are replaced.
struct Launch {
  void* function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  std::vector<uint64_t> values;
  std::vector<Address> addresses;
};

// Launches all in order; the driver's first status that is not 0, or 0. Any number of threads may call at once.
int replay(LaunchKernel launch, const std::vector<Launch>& launches, void* stream, const uint64_t* tensors);

}  // namespace evaat
