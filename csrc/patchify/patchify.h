// uint8 video -> rows of patches, the input of a linear patch embedding. The contract of both versions:
//
//   video  uint8 [B, T, H, W, 3]; the last two dims are packed (strides 3 and 1), the others have the strides given, in bytes
//   table  [3, 256] elements of the output dtype: what each channel's byte becomes
//   out    [B, T * Hp * Wp, 3 * patch * patch], contiguous, columns in the order (c, py, px)
//
// A table instead of arithmetic makes every backend equal to the reference to the last bit, in every dtype.
#pragma once
#include <cstdint>

namespace evaat {

struct PatchifyCall {
  int element_size;  // of the output
  int64_t B, T, H, W, patch;
  int64_t stride_b, stride_t, stride_h;
};

// Both return 0, or a cudaError_t; stream is a cudaStream_t.
int patchify(const PatchifyCall& call, const uint8_t* video, const void* table, void* out, int threads);
int patchify_cuda(const PatchifyCall& call, const uint8_t* video, const void* table, void* out, void* stream);

}  // namespace evaat
