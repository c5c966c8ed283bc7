// LayerNorm of a sum and its gradient: each row is read from memory once and written once.
#include "norm/norm_cpu.h"

namespace evaat {
namespace {

using namespace norm;

struct Forward {
  static EVAAT_INLINE void run(const NormForward* p, int64_t, int64_t from, int64_t to, const Room* room) {
    const int64_t C = p->C;
    for (int64_t i = from; i < to; ++i) {
      const float *x = read(p->x, i, C, room->row(0)), *residual = read(p->residual, i, C, room->row(1));
      float* const total = residual ? p->total + i * C : nullptr;
      fetch(p->x, i + 1, C);
      double sum;
      if (residual) {
        fetch(p->residual, i + 1, C);
        sum = row_sum(C, EVAAT_TERM(c) { return total[c] = x[c] + residual[c]; });
      } else {
        sum = row_sum(C, EVAAT_TERM(c) { return x[c]; });
      }
      x = residual ? total : x;
      float* const out = place_of(p->out, i, C, room->row(2));
      normalise(*p, i, x, sum, out);
      write(p->out, i, C, out);
    }
  }
};

struct Backward {
  static EVAAT_INLINE void run(const NormBackward* p, int64_t chunk, int64_t from, int64_t to, const Room* room) {
    const int64_t C = p->C;
    const float* const weight = p->weight;
    float* const sums = p->sums ? p->sums + chunk * 2 * C : room->row(2);
    std::fill(sums, sums + 2 * C, 0.0f);
    for (int64_t i = from; i < to; ++i) {
      const float *dY = read(p->dY, i, C, room->row(0)), *x = read(p->x, i, C, room->row(1));
      const float mean = p->statistics[i], rstd = p->statistics[p->M + i];
      fetch(p->dY, i + 1, C), fetch(p->x, i + 1, C);
      const auto unit = EVAAT_TERM(c) { return (x[c] - mean) * rstd; };
      const Means means = add_row(dY, unit, weight, C, sums, sums + C);
      const float* const dR = read(p->dR, i, C, room->row(4));
      float* const dx = p->dr ? p->dr + i * C : place_of(p->dx, i, C, room->row(5));
      if (dR) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) dx[c] = (dY[c] * weight[c] - means.d - unit(c) * means.along) * rstd + dR[c];
      } else {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) dx[c] = (dY[c] * weight[c] - means.d - unit(c) * means.along) * rstd;
      }
      if (p->dx.data) write(p->dx, i, C, dx);
    }
  }
};

}  // namespace

// 16,384 numbers a thread, or 3 us with AVX-512, are as little as is worth waking it for.
int add_norm(const NormForward& call, int threads) { return each_chunk<Forward>(call, 2 * call.M * call.C, threads); }

int add_norm_backward(const NormBackward& call, int threads) {
  each_chunk<Backward>(call, 3 * call.M * call.C, threads);
  if (call.sums) add_up(call, threads);
  return kOk;
}

}  // namespace evaat
