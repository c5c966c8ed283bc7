// silu(gate) * value, its LayerNorm, and their gradients. The product is made again in the backward pass: it costs an
// exponential, and to keep it would cost a pass over memory.
#include "common/exp_cpu.h"
#include "norm/norm_cpu.h"

namespace evaat {
namespace {

using namespace norm;

// y / (1 + exp(-x)), rounded as torch rounds it. NaN stays NaN, and minus infinity gives NaN for itself.
EVAAT_INLINE float over_sigmoid(float x, float y) {
  const float most = -Exp<float>::least;
  return y * (x < -most ? 0.0f : 1.0f) / (1.0f + exp_within(-x > most ? most : -x));
}

struct Forward {
  static EVAAT_INLINE void run(const NormForward* p, int64_t, int64_t from, int64_t to, float* room) {
    const int64_t C = p->C;
    for (int64_t i = from; i < to; ++i) {
      const float *gate = read(p->x, i, 2 * C, room), *value = gate + C;
      float* const out = place_of(p->out, i, C, room + 2 * C);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < C; ++c) {
        const float y = over_sigmoid(gate[c], gate[c]) * value[c];
        out[c] = y, sum += double(y);
      }
      if (p->weight) normalise(*p, i, out, sum, out);
      write(p->out, i, C, out);
    }
  }
};

struct Backward {
  static EVAAT_INLINE void run(const NormBackward* p, int64_t chunk, int64_t from, int64_t to, float* room) {
    const int64_t C = p->C;
    const float* const weight = p->weight;
    float *const sigmoid = room + 3 * C, *const silu = room + 4 * C, *const unit = room + 5 * C;
    float* const sums = p->sums ? p->sums + chunk * 2 * C : room + 6 * C;
    if (weight) std::fill(sums, sums + 2 * C, 0.0f);
    for (int64_t i = from; i < to; ++i) {
      const float *gate = read(p->x, i, 2 * C, room), *value = gate + C, *dY = read(p->dY, i, C, room + 2 * C);
      const float mean = weight ? p->statistics[i] : 0, rstd = weight ? p->statistics[p->M + i] : 1;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        sigmoid[c] = over_sigmoid(gate[c], 1.0f), silu[c] = over_sigmoid(gate[c], gate[c]);
        unit[c] = (silu[c] * value[c] - mean) * rstd;
      }
      const Means means = weight ? add_row(dY, unit, weight, C, sums, sums + C) : Means{0, 0};
      float* const dx = place_of(p->dx, i, 2 * C, room + 8 * C);
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        const float d = weight ? (dY[c] * weight[c] - means.d - unit[c] * means.along) * rstd : dY[c];
        dx[c] = d * value[c] * sigmoid[c] * (1.0f + gate[c] * (1.0f - sigmoid[c]));
        dx[C + c] = d * silu[c];
      }
      write(p->dx, i, 2 * C, dx);
    }
  }
};

}  // namespace

// An element counts for more bytes than it has, as its exponential takes the time of some ten.
int swiglu_norm(const NormForward& call, int threads) { return each_chunk<Forward>(call, 16 * call.M * call.C, threads); }

int swiglu_norm_backward(const NormBackward& call, int threads) {
  each_chunk<Backward>(call, 32 * call.M * call.C, threads);
  add_up(call, threads);
  return kOk;
}

}  // namespace evaat
