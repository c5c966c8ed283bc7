// A tile of 128 videos times 128 captions by 8 warps, raw 16-bit rows in, float32 products in registers: computed nowhere else, so
// that ties are exact.
//
// A warp multiplies 32 videos by 64 captions. Rows go through shared memory in chunks of 64 elements, 128 bytes a row, whose
// 16-byte pieces are permuted so that neither the copies nor ldmatrix meet in a bank. Of every 32 captions a thread gets eight
// neighbours: their slopes are one store of 16 bytes, and dense labels two loads.
#pragma once
#include <type_traits>

#include "common/ptx.h"
#include "pairwise/pairwise_cuda.h"

namespace evaat::tile {

constexpr int kThreads = 256, kChunk = 64, kChunkBytes = kTile * kChunk * 2;
// Captions of up to so many elements stay in shared memory while a block goes from one tile of videos to the next.
constexpr int kKept = 256;

struct Matrix {  // rows of a multiple of 16 bytes, E elements each
  const char* rows;
  int64_t stride;  // in bytes
  int64_t N;
};

// Where the pieces of a row lie: rows that a load of ldmatrix takes together differ in these three bits.
__device__ inline int turn_video(int row) { return row & 7; }
__device__ inline int turn_caption(int row) { return (row & 1) | (row >> 2 & 6); }

// A thread copies one 16-byte piece of a chunk of each 32nd row.
struct Copier {
  int row, piece;
  Shared video, caption;  // its first piece in a chunk

  __device__ Copier() {
    const int t = thread();
    row = t >> 3, piece = t & 7;
    video = row * 128 + ((piece ^ turn_video(row)) << 4), caption = row * 128 + ((piece ^ turn_caption(row)) << 4);
  }
  __device__ const char* begin(const Matrix& x, int64_t first) const { return x.rows + (first + row) * x.stride + 16 * piece; }
  // Begins to copy the pieces that are `from` and below it; what lies beyond `rows` rows of E elements is zero.
  __device__ void copy(const char* from, int64_t stride, int rows, int E, int k, Shared to) const {
    const bool inside = kChunk * k + 8 * piece < E;
    from += 2 * kChunk * k;
#pragma unroll
    for (int i = 0; i < 4; ++i, from += 32 * stride) copy_async(to + 32 * 128 * i, from, inside && row + 32 * i < rows);
  }
};

// acc[half of 16 videos][8 captions][...]: see `video_of` and `caption_of`.
using Products = float[2][8][4];

struct Lane {
  int warp_m, warp_n, g, q;
  Shared video, caption;  // what ldmatrix adds to the address of a chunk, for the first 16 elements; exclusive or 32 k for others

  __device__ Lane() : Lane(thread() & 31) {}
  __device__ explicit Lane(int lane) {
    const int warp = thread() >> 5, row = lane & 7, matrix = lane >> 3;
    warp_m = 32 * (warp & 3), warp_n = 64 * (warp >> 2), g = lane >> 2, q = lane & 3;
    const int m = warp_m + row + 8 * (matrix & 1), n = warp_n + 8 * (row >> 1) + (row & 1) + 2 * (matrix >> 1);
    video = m * 128 + ((turn_video(m) ^ (matrix >> 1)) << 4);
    caption = n * 128 + ((turn_caption(n) ^ (matrix & 1)) << 4);
  }
  // Of the tile: acc[r / 2][..][2 (r % 2) + ..] is of this video, acc[..][4 group + c / 2][.. + c % 2] of this caption.
  __device__ int video_of(int r) const { return warp_m + 8 * r + g; }
  __device__ int caption_of(int group, int c) const { return warp_n + 32 * group + 8 * q + c; }
};

// acc += a chunk of both, or where it is the first, acc = it.
template <class T, bool first>
__device__ inline void multiply(Products& acc, Shared videos, Shared captions) {
  const Lane lane(first ? thread() & 31 : thread_of_warp());
  const Shared a_row = videos + lane.video, b_row = captions + lane.caption;
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    const Shared a_at = a_row ^ 32 * k, b_at = b_row ^ 32 * k;
    uint32_t a[2][4];
    ldmatrix(a[0], a_at), ldmatrix(a[1], a_at + 16 * 128);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {  // captions 2 j + .. of each group of 32: n = 32 (j / 4) + 2 (j % 4) + ..
      uint32_t b[4];
      ldmatrix(b, b_at + (32 * (j / 4) + 2 * (j % 4)) * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float(&to)[4] = acc[i & 1][j + (i >> 1)];
        if (first && k == 0) {
          const float zero[4] = {};
          mma<T>(to, a[i & 1], b[i & 2], b[(i & 2) + 1], zero);
        } else {
          mma<T>(to, a[i & 1], b[i & 2], b[(i & 2) + 1], to);
        }
      }
    }
  }
}

// Shared memory of a block: the captions' chunks, all or two; two chunks of videos; and room for what belongs to their rows.
__host__ __device__ inline bool kept(int E) { return E <= kKept; }
__host__ __device__ inline int caption_chunks(int E) { return kept(E) ? (E + kChunk - 1) / kChunk : 2; }

// The products of `count` tiles of videos from row m on with the captions from row n on. with(i, acc, room) is called for
// each, room: 16 KB of shared memory that nothing is in, once all threads are there; begin(i) before, by all threads when they have
// left the tile before, to copy what belongs to its videos.
template <class T, class Begin, class With>
__device__ inline void walk(const Matrix& video, const Matrix& text, int E, int m, int n, int count, Shared pool, Begin begin,
                            With with) {
  const int chunks = (E + kChunk - 1) / kChunk;
  const bool keep = kept(E);
  const Shared captions = pool, videos = pool + caption_chunks(E) * kChunkBytes;
  int slot = 0;
  auto load_captions = [&](int k, int to) {
    const Copier copier;
    copier.copy(copier.begin(text, n), text.stride, int(text.N) - n, E, k, captions + copier.caption + to * kChunkBytes);
  };
  auto load = [&](int i, int k, int to) {
    const Copier copier;
    const int first = m + i * kTile;
    copier.copy(copier.begin(video, first), video.stride, int(video.N) - first, E, k, videos + copier.video + to * kChunkBytes);
    if (!keep) load_captions(k, to);
  };
  for (int k = 0; keep && k < chunks; ++k) load_captions(k, k);
  load(0, 0, 0);
  copy_async_commit();
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    Products acc;
    auto step = [&](int k, auto first) {
      copy_async_wait<0>();
      __syncthreads();  // this chunk is there for all, and the one before has been read
      if (k == 0) begin(i);
      const bool more = k + 1 < chunks;
      if (more || i + 1 < count) load(more ? i : i + 1, more ? k + 1 : 0, slot ^ 1);
      copy_async_commit();
      multiply<T, decltype(first)::value>(acc, videos + slot * kChunkBytes, captions + (keep ? k : slot) * kChunkBytes);
      slot ^= 1;
    };
    step(0, std::true_type());
#pragma unroll 1
    for (int k = 1; k < chunks; ++k) step(k, std::false_type());
    if (chunks == 1) {  // what begin() copies has not been waited for
      copy_async_wait<0>();
      __syncthreads();
    }
    with(i, acc, videos + (slot ^ 1) * kChunkBytes);
  }
}

}  // namespace evaat::tile
