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
  static EVAAT_INLINE void run(const NormForward* p, int64_t, int64_t from, int64_t to, const Room* room) {
    const int64_t C = p->C;
    for (int64_t i = from; i < to; ++i) {
      const float *gate = read(p->x, i, 2 * C, room->row(0)), *value = gate + C;
      float* const out = place_of(p->out, i, C, room->row(2));
      fetch(p->x, i + 1, 2 * C);
      const double sum = row_sum(C, EVAAT_TERM(c) { return out[c] = over_sigmoid(gate[c], gate[c]) * value[c]; });
      if (p->weight) normalise(*p, i, out, sum, out);
      write(p->out, i, C, out);
    }
  }
};

struct Backward {
  static EVAAT_INLINE void run(const NormBackward* p, int64_t chunk, int64_t from, int64_t to, const Room* room) {
    const int64_t C = p->C;
    const float* const weight = p->weight;
    float *const sigmoid = room->row(3), *const unit = room->row(4), *const sums = p->sums ? p->sums + chunk * 2 * C : room->row(5);
    if (weight) std::fill(sums, sums + 2 * C, 0.0f);
    for (int64_t i = from; i < to; ++i) {
      const float *gate = read(p->x, i, 2 * C, room->row(0)), *value = gate + C, *dY = read(p->dY, i, C, room->row(2));
      float* const dx = place_of(p->dx, i, 2 * C, room->row(7));
      fetch(p->x, i + 1, 2 * C), fetch(p->dY, i + 1, C);
      if (weight) {
        const float mean = p->statistics[i], rstd = p->statistics[p->M + i];
        const auto make = EVAAT_TERM(c) {
          sigmoid[c] = over_sigmoid(gate[c], 1.0f);
          return unit[c] = (gate[c] * sigmoid[c] * value[c] - mean) * rstd;
        };
        const Means means = add_row(dY, make, weight, C, sums, sums + C);
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          const float d = (dY[c] * weight[c] - means.d - unit[c] * means.along) * rstd;
          dx[c] = d * value[c] * sigmoid[c] * (1.0f + gate[c] * (1.0f - sigmoid[c]));
          dx[C + c] = d * gate[c] * sigmoid[c];
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          const float s = over_sigmoid(gate[c], 1.0f);
          dx[c] = dY[c] * value[c] * s * (1.0f + gate[c] * (1.0f - s));
          dx[C + c] = dY[c] * over_sigmoid(gate[c], gate[c]);
        }
      }
      write(p->dx, i, 2 * C, dx);
    }
  }
};

}  // namespace

// Half as many numbers a thread as of add_norm take as long.
int swiglu_norm(const NormForward& call, int threads) { return each_chunk<Forward>(call, 4 * call.M * call.C, threads); }

int swiglu_norm_backward(const NormBackward& call, int threads) {
  each_chunk<Backward>(call, 8 * call.M * call.C, threads);
  if (call.sums) add_up(call, threads);
  return kOk;
}

}  // namespace evaat
