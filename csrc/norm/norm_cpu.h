// What the CPU kernels of the norms share. A row is widened to floats in L1, unless it is of floats, so that one loop serves all
// dtypes; the compiler vectorises the loops once for each instruction set.
#pragma once
#include <cmath>
#include <memory>

#include "common/cpu.h"
#include "norm/norm.h"

namespace evaat {
namespace norm {

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
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < C; ++c) {
    const float deviation = x[c] - mean;
    squares += double(deviation * deviation);
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
#pragma omp simd reduction(+ : sum, along)
  for (int64_t c = 0; c < C; ++c) {
    const float d = dY[c] * weight[c];
    sum += double(d), along += double(d * unit[c]);
    dweight[c] += dY[c] * unit[c], dbias[c] += dY[c];
  }
  return {float(sum / double(C)), float(along / double(C))};
}

// Scratch rows of C floats that a body has.
constexpr int64_t kRoom = 10;

template <class Body, class Call>
int each_chunk(const Call& call, int64_t bytes, int threads) {
  const int64_t chunk = norm_chunk(call.M), chunks = norm_chunks(call.M);
#pragma omp parallel num_threads(useful(threads, bytes))
  {
    const std::unique_ptr<float[]> room(new float[size_t(kRoom * call.C)]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) run_best<Body>(&call, i, i * chunk, std::min(call.M, (i + 1) * chunk), room.get());
  }
  return kOk;
}

// dweight and dbias of the chunks' sums, in one order.
inline void add_up(const NormBackward& call, int threads) {
  constexpr int64_t kColumns = 128;
  const int64_t chunks = norm_chunks(call.M), width = 2 * call.C;
  if (!call.sums) return;
#pragma omp parallel for num_threads(useful(threads, 8 * chunks * call.C)) schedule(static)
  for (int64_t first = 0; first < width; first += kColumns) {
    double total[kColumns] = {};
    const int64_t count = std::min(kColumns, width - first);
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < count; ++c) total[c] += double(call.sums[i * width + first + c]);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = first + c;
      if (at < call.C)
        call.dweight[at] = float(total[c]);
      else if (call.dbias)
        call.dbias[at - call.C] = float(total[c]);
    }
  }
}

}  // namespace norm
}  // namespace evaat
