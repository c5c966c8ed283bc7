// One block per (clip, frame, row of patches); the table lies in shared memory (3 or 1.5 KB). A thread takes output
// elements in order, so stores coalesce; the bytes of a patch row are re-read three times, from L1.
#include "common/launch.h"
#include "patchify/patchify.h"

namespace evaat {
namespace {

template <class T>
__global__ void __launch_bounds__(256) patchify_kernel(const uint8_t* __restrict__ video, const T* __restrict__ table,
                                                       T* __restrict__ out, int frames, int Hp, int Wp, int patch,
                                                       int64_t stride_b, int64_t stride_t, int64_t stride_h) {
  __shared__ T lut[768];
  for (int i = threadIdx.x; i < 768; i += blockDim.x) lut[i] = table[i];
  __syncthreads();
  const int64_t row = blockIdx.x;
  const int64_t b = row / (int64_t(frames) * Hp), t = row / Hp % frames, h = row % Hp;
  const uint8_t* top = video + b * stride_b + t * stride_t + h * patch * stride_h;
  T* to = out + row * Wp * 3 * patch * patch;
  const int area = patch * patch, width = 3 * area, total = Wp * width;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int w = i / width, column = i % width, c = column / area, y = column % area / patch, x = column % patch;
    to[i] = lut[256 * c + top[y * stride_h + (w * patch + x) * 3 + c]];
  }
}

}  // namespace

int patchify_cuda(const PatchifyCall& call, const uint8_t* video, const void* table, void* out, void* stream) {
  const int T = int(call.T), patch = int(call.patch), Hp = int(call.H / patch), Wp = int(call.W / patch);
  const int64_t blocks = call.B * T * Hp;
  if (blocks == 0 || Wp == 0) return cudaSuccess;
  const dim3 grid{unsigned(blocks)}, block{256};
  if (call.element_size == 4)
    return launch(patchify_kernel<uint32_t>, grid, block, stream, video, (const uint32_t*)table, (uint32_t*)out, T, Hp, Wp, patch,
                  call.stride_b, call.stride_t, call.stride_h);
  return launch(patchify_kernel<uint16_t>, grid, block, stream, video, (const uint16_t*)table, (uint16_t*)out, T, Hp, Wp, patch,
                call.stride_b, call.stride_t, call.stride_h);
}

}  // namespace evaat
