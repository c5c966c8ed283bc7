// LayerNorm of a sum and its gradient: each row is read from memory once and written once.
#include "norm/norm_cpu.h"

namespace evaat {
namespace {

using namespace norm;

struct Forward {
  static EVAAT_INLINE void run(const NormForward* p, int64_t, int64_t from, int64_t to, float* room) {
    const int64_t C = p->C;
    for (int64_t i = from; i < to; ++i) {
      const float *x = read(p->x, i, C, room), *residual = read(p->residual, i, C, room + C);
      double sum = 0;
      if (residual) {
        float* const total = p->total + i * C;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; ++c) {
          const float t = x[c] + residual[c];
          total[c] = t, sum += double(t);
        }
        x = total;
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < C; ++c) sum += double(x[c]);
      }
      float* const out = place_of(p->out, i, C, room + 2 * C);
      normalise(*p, i, x, sum, out);
      write(p->out, i, C, out);
    }
  }
};

struct Backward {
  static EVAAT_INLINE void run(const NormBackward* p, int64_t chunk, int64_t from, int64_t to, float* room) {
    const int64_t C = p->C;
    const float* const weight = p->weight;
    float* const unit = room + 2 * C;
    float* const sums = p->sums ? p->sums + chunk * 2 * C : room + 3 * C;
    std::fill(sums, sums + 2 * C, 0.0f);
    for (int64_t i = from; i < to; ++i) {
      const float *dY = read(p->dY, i, C, room), *x = read(p->x, i, C, room + C);
      const float mean = p->statistics[i], rstd = p->statistics[p->M + i];
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) unit[c] = (x[c] - mean) * rstd;
      const Means means = add_row(dY, unit, weight, C, sums, sums + C);
      const float* const dR = read(p->dR, i, C, room + 5 * C);
      float* const dx = p->dr ? p->dr + i * C : place_of(p->dx, i, C, room + 6 * C);
      if (dR) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) dx[c] = (dY[c] * weight[c] - means.d - unit[c] * means.along) * rstd + dR[c];
      } else {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) dx[c] = (dY[c] * weight[c] - means.d - unit[c] * means.along) * rstd;
      }
      if (p->dx.data) write(p->dx, i, C, dx);
    }
  }
};

}  // namespace

int add_norm(const NormForward& call, int threads) { return each_chunk<Forward>(call, 8 * call.M * call.C, threads); }

int add_norm_backward(const NormBackward& call, int threads) {
  each_chunk<Backward>(call, 12 * call.M * call.C, threads);
  add_up(call, threads);
  return kOk;
}

}  // namespace evaat
