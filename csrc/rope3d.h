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

namespace evaat {

struct RopeTensor {
  const void* in;
  void* out;
  int64_t heads, in_b, in_h, in_n, out_b, out_h, out_n;
};

struct RopeTable {
  const float* cos;
  const float* sin;
  int64_t stride_b, stride_h;
};

// Returns a Status.
int rope3d(int dtype, const RopeTensor* x, int tensors, const RopeTable& table, int64_t B, int64_t N, int64_t D, int64_t prefix,
           bool interleaved, bool inverse, int threads);

}  // namespace evaat
