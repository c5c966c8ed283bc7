// What the CPU kernels of the norms share. A row is widened to floats in L1, unless it is of floats, so that one loop serves all
// dtypes; the compiler vectorises the loops once for each instruction set.
#pragma once
#include <cmath>
#include <memory>

#include "common/cpu.h"
#include "norm/norm.h"

// What a sum takes of channel c: a lambda that is inlined into its caller, and so compiled for its instruction set.
#if defined(__GNUC__)
#define EVAAT_TERM(c) [&](int64_t c) __attribute__((always_inline))
#else
#define EVAAT_TERM(c) [&](int64_t c)
#endif

namespace evaat {
namespace norm {

// The sum of term(c) over a row, in a fixed order: of four quarters at a time, as each addition waits for the one before it.
template <class Term>
EVAAT_INLINE double row_sum(int64_t C, Term term) {
  const int64_t Q = C / 4;
  float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < Q; ++i) a += term(i), b += term(i + Q), c += term(i + 2 * Q), d += term(i + 3 * Q);
  double sum = (double(a) + double(b)) + (double(c) + double(d));
  for (int64_t i = 4 * Q; i < C; ++i) sum += double(term(i));
  return sum;
}

// Has row i brought into L1: the next one, while this one is computed. Past the end of memory that does nothing.
EVAAT_INLINE void fetch(const NormRows& rows, int64_t i, int64_t n) {
  const int64_t bytes = n * (rows.dtype == kFloat32 ? 4 : 2);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(rows.data) + i * bytes + at);
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
  const double squares = row_sum(C, EVAAT_TERM(c) { return (x[c] - mean) * (x[c] - mean); });
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

// The means over a row of d = dY * weight and of d * unit(c), a channel after its norm, before weight and bias.
struct Means {
  float d, along;
};

template <class Unit>
EVAAT_INLINE Means add_row(const float* dY, Unit unit, const float* weight, int64_t C, float* dweight, float* dbias) {
  const double sum = row_sum(C, EVAAT_TERM(c) { return dY[c] * weight[c]; });
  const double along = row_sum(C, EVAAT_TERM(c) {
    const float u = unit(c);
    dweight[c] += dY[c] * u, dbias[c] += dY[c];
    return dY[c] * weight[c] * u;
  });
  return {float(sum / double(C)), float(along / double(C))};
}

// Scratch rows of a thread, of C floats from the begin of a cache line on: 3 of 10 ns per 16 channels less. A row and the next are
// also 2 C floats in a run. 16 to 31 floats lie between two rows, which else begin at one place of a page if C is a power of two.
class Room {
 public:
  explicit Room(int64_t C) : stride_((C + 31) / 16 * 16), memory_(new float[size_t(9 * stride_ + 16)]) {
    first_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }
  EVAAT_INLINE float* row(int64_t i) const { return first_ + i * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<float[]> memory_;
  float* first_;
};

template <class Body, class Call>
int each_chunk(const Call& call, int64_t bytes, int threads) {
  const int64_t chunk = norm_chunk(call.M), chunks = norm_chunks(call.M);
#pragma omp parallel num_threads(useful(threads, bytes))
  {
    const Room room(call.C);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) run_best<Body, true>(&call, i, i * chunk, std::min(call.M, (i + 1) * chunk), &room);
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
