// Bytes are read in the order they lie in memory, one pixel row of one patch at a time, and written as three short runs.
#include "patchify/patchify.h"

namespace evaat {
namespace {

template <class T>
void run(const uint8_t* video, const T* table, T* out, int64_t B, int64_t frames, int64_t H, int64_t W, int64_t stride_b,
         int64_t stride_t, int64_t stride_h, int64_t patch, int threads) {
  const int64_t Hp = H / patch, Wp = W / patch, area = patch * patch;
  const int64_t rows = B * frames * Hp;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {  // one row of patches
    const int64_t b = row / (frames * Hp), t = row / Hp % frames, h = row % Hp;
    const uint8_t* top = video + b * stride_b + t * stride_t + h * patch * stride_h;
    for (int64_t w = 0; w < Wp; ++w) {
      T* token = out + (row * Wp + w) * 3 * area;
      for (int64_t y = 0; y < patch; ++y) {
        const uint8_t* pixel = top + y * stride_h + w * patch * 3;
        T* red = token + y * patch;
        for (int64_t x = 0; x < patch; ++x, pixel += 3) {
          red[x] = table[pixel[0]];
          red[x + area] = table[256 + pixel[1]];
          red[x + 2 * area] = table[512 + pixel[2]];
        }
      }
    }
  }
}

}  // namespace

void patchify(const uint8_t* video, const void* table, void* out, int element_size, int64_t B, int64_t T, int64_t H, int64_t W,
              int64_t stride_b, int64_t stride_t, int64_t stride_h, int64_t patch, int threads) {
  if (element_size == 4)
    run(video, (const uint32_t*)table, (uint32_t*)out, B, T, H, W, stride_b, stride_t, stride_h, patch, threads);
  else
    run(video, (const uint16_t*)table, (uint16_t*)out, B, T, H, W, stride_b, stride_t, stride_h, patch, threads);
}

}  // namespace evaat
