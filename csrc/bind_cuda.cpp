// The module evaat_fast._cuda: argument unpacking only. It links the CUDA runtime statically and imports without a driver.
#include "common/bind.h"
#include "pairwise/bind_cuda.h"
#include "patchify/bind.h"
#include "rope3d/bind.h"

#ifndef EVAAT_CODES
#define EVAAT_CODES ""
#endif

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of evaat-fast, free of torch; every function returns a cudaError_t";
  m.attr("CODES") = EVAAT_CODES;  // what it was compiled for, as nvcc names it: "sm_80 sm_90a compute_100"
  evaat::bind_dtypes(m);
  evaat::bind_rope3d<evaat::Pointer>(m, evaat::rope3d_cuda);
  evaat::bind_pairwise_cuda(m);
  evaat::bind_patchify<evaat::Pointer>(m, evaat::patchify_cuda);
}
