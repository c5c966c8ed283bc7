// Rotary embedding of the channel pairs of one or two tensors by tables of cosines and sines. The contract:
//
//   x      one or two tensors [B, heads, N, D] of one dtype; strides in elements, the last dimension contiguous; out may be in
//   table  cosines and sines, float32 [N - prefix, D/2] with contiguous rows; stride_b and stride_h are 0 where clips or
//          heads share them
//
// (a, b) -> (a cos - b sin, b cos + a sin), in float32, rounded once. Pairs are channels (2c, 2c + 1) if interleaved, else
// (c, c + D/2). inverse turns the other way. The first `prefix` tokens are copied, and not touched where out is in.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace evaat {

struct RopeCall {
  int dtype;  // of the tensors: a Dtype, but kFloat64
  int64_t B, N, D, prefix;
  bool interleaved, inverse;
};

struct RopeTensor {
  const void* in;
  void* out;
  int64_t heads, in_b, in_h, in_n, out_b, out_h, out_n;
};

template <class F>
struct RopeTable {
  const F *cos, *sin;
  int64_t stride_b, stride_h;
};

// A Status, or of a GPU a cudaError_t; stream is a cudaStream_t.
int rope3d(const RopeCall& call, const RopeTensor* x, int tensors, const RopeTable<float>& table, int threads);
// Here a third tensor, with as many heads as the second, is copied.
int rope3d_cuda(const RopeCall& call, const RopeTensor* x, int tensors, const RopeTable<float>& table, void* stream);

// The backward pass where frequencies are learnable. grad: `in` is the gradient of the rotated tensor, `out` becomes that of the
// tensor. saved: what was rotated. A pair's angle has the slope a g_b - b g_a, (a, b) of x and (g_a, g_b) of the tensor's gradient
// before it is rounded; a frequency's is the sum of positions times these. The table is float64, since one of float32 would add
// more error to the sum than all that torch makes.
struct RopeSaved {
  const void* x;
  int64_t x_b, x_h, x_n;
};

struct RopeGradient {
  RopeTensor grad;
  RopeSaved saved;
};

struct RopePositions {
  const float* rows;  // [N - prefix, 3], contiguous; stride_b as in RopeTable
  int64_t stride_b;
};

// Tokens of a partial sum. Partial sums depend on the shape alone, so that the result is the same for any number of threads.
// Exported to Python as ROPE_CHUNK.
constexpr int64_t kRopeChunk = 64;

// partial: [B * ceil((N - prefix) / kRopeChunk), heads or 1, 3, D/2], to be summed over its first dimension; heads where the
// table has one for each.
int rope3d_freqs(const RopeCall& call, const RopeGradient* x, int tensors, const RopeTable<double>& table,
                 const RopePositions& positions, double* partial, int threads);

}  // namespace evaat
