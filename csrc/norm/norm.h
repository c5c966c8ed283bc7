// LayerNorm of rows of C channels, of x + residual (add_norm) or of silu(gate) * value (swiglu_norm). The contract:
//
//   x           [M, C], of swiglu_norm [M, 2 C], gates first; residual, out and dR [M, C]. All contiguous, each of its own dtype
//   total       x + residual, null where there is no residual and total is x
//   weight      float32 [C], as bias, which may be null; of swiglu_norm null where there is no norm
//   statistics  [2, M]: means, and 1 / standard deviations
//
// In float32, rounded once. Every function returns a Status.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/dtype.h"

namespace evaat {

struct NormRows {
  void* data;  // null: not there
  int dtype;   // a Dtype, but kFloat64
};

struct NormForward {
  int64_t M, C;
  NormRows x, residual, out;
  const float *weight, *bias;
  float *total, *statistics, eps;
};

// The gradients. x: the total of add_norm. dR: that of the total from elsewhere. dx and dr: of add_norm, one gradient in two
// dtypes, of which either may be null. sums: [norm_chunks(M), 2, C], the parts of dweight and dbias, null where these are.
struct NormBackward {
  int64_t M, C;
  NormRows dY, dR, x, dx;
  const float *weight, *statistics;
  float *dr, *sums, *dweight, *dbias;
};

// Rows of a partial sum, and of what a thread takes at a time. It depends on the shape alone, so that the result is the same for
// any number of threads.
constexpr int64_t norm_chunk(int64_t M) { return std::min<int64_t>(128, std::max<int64_t>(8, (M + 31) / 32)); }
constexpr int64_t norm_chunks(int64_t M) { return (M + norm_chunk(M) - 1) / norm_chunk(M); }

int add_norm(const NormForward& call, int threads);
int add_norm_backward(const NormBackward& call, int threads);
int swiglu_norm(const NormForward& call, int threads);
int swiglu_norm_backward(const NormBackward& call, int threads);

}  // namespace evaat
