// Bytes are read in the order they lie in memory, one pixel row of one patch at a time, and written as three short runs.
#include "patchify/patchify.h"

namespace evaat {
namespace {

template <class T>
void run(const PatchifyCall& call, const uint8_t* video, const T* table, T* out, int threads) {
  const int64_t patch = call.patch, frames = call.T, Hp = call.H / patch, Wp = call.W / patch, area = patch * patch;
  const int64_t rows = call.B * frames * Hp;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {  // one row of patches
    const int64_t b = row / (frames * Hp), t = row / Hp % frames, h = row % Hp;
    const uint8_t* top = video + b * call.stride_b + t * call.stride_t + h * patch * call.stride_h;
    for (int64_t w = 0; w < Wp; ++w) {
      T* token = out + (row * Wp + w) * 3 * area;
      for (int64_t y = 0; y < patch; ++y) {
        const uint8_t* pixel = top + y * call.stride_h + w * patch * 3;
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

int patchify(const PatchifyCall& call, const uint8_t* video, const void* table, void* out, int threads) {
  if (call.element_size == 4)
    run(call, video, (const uint32_t*)table, (uint32_t*)out, threads);
  else
    run(call, video, (const uint16_t*)table, (uint16_t*)out, threads);
  return 0;
}

}  // namespace evaat
