// What the CPU kernels of the norms share. A row is widened to floats in L1, unless it is of floats, so that one loop serves all
// dtypes; the compiler vectorises the loops once for each instruction set.
#pragma once
#include <cmath>
#include <memory>

#include "common/cpu.h"
#include "norm/norm.h"

namespace evaat {
namespace norm {

// Channels whose sum is taken in float, in as many strands as a vector has, before it is added up in double: all of it in double
// would take as long as the rest of a norm.
constexpr int64_t kBlock = 256;

// Has channels [first, last) of row i brought into L1: the next row's, while this one is computed. Past the end of memory that
// does nothing.
EVAAT_INLINE void fetch(const NormRows& rows, int64_t i, int64_t n, int64_t first, int64_t last) {
  const int64_t size = rows.dtype == kFloat32 ? 4 : 2;
  const char* const row = static_cast<const char*>(rows.data) + i * n * size;
  for (int64_t at = first * size; at < last * size; at += 64) __builtin_prefetch(row + at);
}

template <class T>
EVAAT_INLINE const float* widened(const T* x, int64_t n, float* room) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) room[c] = widen(x[c]);
  return room;
}

// Row i, of n numbers, in place or widened into `room`; null where there are no rows.
EVAAT_INLINE const float* read(const NormRows& rows, int64_t i, int64_t n, float* room) {
  if (!rows.data) return nullptr;
  if (rows.dtype == kFloat32) return static_cast<const float*>(rows.data) + i * n;
  if (rows.dtype == kBFloat16) return widened(static_cast<const BFloat*>(rows.data) + i * n, n, room);
  return widened(static_cast<const Half*>(rows.data) + i * n, n, room);
}

// Where row i is to be made: in place, or in `room`, from which `write` takes it.
EVAAT_INLINE float* place_of(const NormRows& rows, int64_t i, int64_t n, float* room) {
  return rows.dtype == kFloat32 ? static_cast<float*>(rows.data) + i * n : room;
}

template <class T>
EVAAT_INLINE void narrowed(const float* row, int64_t n, T* to) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) narrow(to[c], row[c]);
}

EVAAT_INLINE void write(const NormRows& rows, int64_t i, int64_t n, const float* row) {
  if (rows.dtype == kBFloat16) narrowed(row, n, static_cast<BFloat*>(rows.data) + i * n);
  if (rows.dtype == kFloat16) narrowed(row, n, static_cast<Half*>(rows.data) + i * n);
}

// The norm of row i, which is x and adds up to `sum`. out may be x.
EVAAT_INLINE void normalise(const NormForward& p, int64_t i, const float* x, double sum, float* out) {
  const int64_t C = p.C;
  const float *weight = p.weight, *bias = p.bias, mean = float(sum / double(C));
  double squares = 0;
  for (int64_t first = 0; first < C; first += kBlock) {
    const int64_t last = std::min(C, first + kBlock);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = first; c < last; ++c) part += (x[c] - mean) * (x[c] - mean);
    squares += double(part);
  }
  const float rstd = float(1 / std::sqrt(squares / double(C) + double(p.eps)));
  p.statistics[i] = mean, p.statistics[p.M + i] = rstd;
  if (bias) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) out[c] = (x[c] - mean) * rstd * weight[c] + bias[c];
  } else {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) out[c] = (x[c] - mean) * rstd * weight[c];
  }
}

// The means over a row of d = dY * weight and of d * unit, unit the row after its norm, before weight and bias.
struct Means {
  float d, along;
};

EVAAT_INLINE Means add_row(const float* dY, const float* unit, const float* weight, int64_t C, float* dweight, float* dbias) {
  double sum = 0, along = 0;
  for (int64_t first = 0; first < C; first += kBlock) {
    const int64_t last = std::min(C, first + kBlock);
    float part = 0, part_along = 0;
#pragma omp simd reduction(+ : part, part_along)
    for (int64_t c = first; c < last; ++c) {
      const float d = dY[c] * weight[c];
      part += d, part_along += d * unit[c];
      dweight[c] += dY[c] * unit[c], dbias[c] += dY[c];
    }
    sum += double(part), along += double(part_along);
  }
  return {float(sum / double(C)), float(along / double(C))};
}

// Scratch rows of a thread; a row and the next are also 2 C floats in a run. Where C is a power of two they would all begin at
// one place of a page, and stores would seem to be what later loads ask for.
struct Room {
  float* data;
  int64_t C;
  EVAAT_INLINE float* operator[](int64_t row) const { return data + row * (C + 80); }
};
constexpr int64_t kRoom = 9;

template <class Body, class Call>
int each_chunk(const Call& call, int64_t bytes, int threads) {
  const int64_t chunk = norm_chunk(call.M), chunks = norm_chunks(call.M);
#pragma omp parallel num_threads(useful(threads, bytes))
  {
    const std::unique_ptr<float[]> memory(new float[size_t(kRoom * (call.C + 80))]);
    const Room room{memory.get(), call.C};
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) run_best<Body, true>(&call, i, i * chunk, std::min(call.M, (i + 1) * chunk), room);
  }
  return kOk;
}

// total[c] = the sum of parts[i * stride + c], in one order.
struct AddUp {
  static constexpr int64_t kColumns = 128;
  static EVAAT_INLINE void run(const float* parts, int64_t chunks, int64_t stride, int64_t count, float* to) {
    double total[kColumns] = {};
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < count; ++c) total[c] += double(parts[i * stride + c]);
    for (int64_t c = 0; c < count; ++c) to[c] = float(total[c]);
  }
};

// dweight and dbias of the chunks' sums.
inline void add_up(const NormBackward& call, int threads) {
  constexpr int64_t width = AddUp::kColumns;
  const int64_t C = call.C, blocks = (C + width - 1) / width;
#pragma omp parallel for num_threads(useful(threads, 8 * norm_chunks(call.M) * C)) schedule(static)
  for (int64_t i = 0; i < 2 * blocks; ++i) {
    const int64_t first = i % blocks * width, of = i / blocks;
    float* const to = of ? call.dbias : call.dweight;
    if (to) run_best<AddUp>(call.sums + of * C + first, norm_chunks(call.M), 2 * C, std::min(width, C - first), to + first);
  }
}

}  // namespace norm
}  // namespace evaat
