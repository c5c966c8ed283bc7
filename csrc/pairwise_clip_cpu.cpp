// The symmetric cross-entropy's two sweeps. Row statistics belong to one thread each; column statistics are carried from panel to
// panel by threads that own ranges of columns, so every sum has one order, whatever the number of threads. exp is a polynomial
// that the compiler vectorises: libm's would take longer than the products.
#include <algorithm>
#include <limits>
#include <vector>

#include "pairwise_cpu.h"

namespace evaat {
namespace {

constexpr int64_t kColumns = 256;

// exp(x) for x <= 0, to 2 units in the last place; below the smallest normal number it stays there instead of reaching 0.
EVAAT_INLINE float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;  // NaN stays NaN
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

EVAAT_INLINE double exp_negative(double x) {
  x = x < -708.0 ? -708.0 : x;
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0, n = shifted - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits - 0x4338000000000000u + 1023u) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return p * power;
}

struct RowStats {
  template <class T>
  static EVAAT_INLINE void run(const T* s, int64_t N, T scale, double* largest, double* sum) {
    T most = -std::numeric_limits<T>::infinity();
    double whole = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < N; ++i) {
      const T x = scale * s[i];
      most = x > most ? x : most;
    }
#pragma omp simd reduction(+ : whole)
    for (int64_t i = 0; i < N; ++i) whole += double(exp_negative(scale * s[i] - most));
    *largest = double(most);
    *sum = whole;
  }
};

// One panel's part of `count` <= kColumns columns.
struct ColumnStats {
  template <class T>
  static EVAAT_INLINE void run(const T* s, int64_t rows, int64_t N, int64_t count, T scale, double* largest, double* sum) {
    T top[kColumns];
    double part[kColumns];
    for (int64_t i = 0; i < count; ++i) top[i] = T(largest[i]), part[i] = 0;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t i = 0; i < count; ++i) {
        const T x = scale * s[j * N + i];
        top[i] = x > top[i] ? x : top[i];
      }
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t i = 0; i < count; ++i) part[i] += double(exp_negative(scale * s[j * N + i] - top[i]));
    for (int64_t i = 0; i < count; ++i) {
      sum[i] *= double(exp_negative(T(largest[i]) - top[i]));
      sum[i] += part[i];
      largest[i] = double(top[i]);
    }
  }
};

// s becomes the slopes; largest and inverse are the columns' maxima and the inverses of their sums.
struct RowSlopes {
  template <class T>
  static EVAAT_INLINE void run(T* s, int64_t N, int64_t own, T scale, T row_largest, T row_inverse, const T* largest,
                               const T* inverse, double* slope) {
    const T pair = s[own];
    double whole = 0;
#pragma omp simd reduction(+ : whole)
    for (int64_t i = 0; i < N; ++i) {
      const T x = s[i], logit = scale * x;
      const T slope_here = exp_negative(logit - row_largest) * row_inverse + exp_negative(logit - largest[i]) * inverse[i];
      whole += double(slope_here) * double(x);
      s[i] = slope_here;
    }
    // (p - 1) + (q - 1), not p + q - 2: both differences are exact where the pair is learned.
    const T from_row = exp_negative(scale * pair - row_largest) * row_inverse - T(1);
    const T from_column = exp_negative(scale * pair - largest[own]) * inverse[own] - T(1);
    s[own] = from_row + from_column;
    *slope = whole - 2.0 * double(pair);
  }
};

template <class T>
void stats(const ClipPanel& p, int threads) {
  T* s = static_cast<T*>(p.s);
  const T scale = T(p.scale);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t j = p.first + r;
    run_best<RowStats>(static_cast<const T*>(s + r * p.N), p.N, scale, p.row_max + j, p.row_sum + j);
    p.target[j] = double(scale * s[r * p.N + j]);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < p.N; i += kColumns)
    run_best<ColumnStats>(static_cast<const T*>(s + i), p.rows, p.N, std::min(kColumns, p.N - i), scale, p.col_max + i, p.col_sum + i);
}

template <class T>
void slopes(const ClipPanel& p, int threads) {
  T* s = static_cast<T*>(p.s);
  const T scale = T(p.scale);
  std::vector<T> largest(p.N), inverse(p.N);
  for (int64_t i = 0; i < p.N; ++i) largest[i] = T(p.col_max[i]), inverse[i] = T(1 / p.col_sum[i]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t j = p.first + r;
    run_best<RowSlopes>(s + r * p.N, p.N, j, scale, T(p.row_max[j]), T(1 / p.row_sum[j]), static_cast<const T*>(largest.data()),
                        static_cast<const T*>(inverse.data()), p.row_slope + j);
  }
}

}  // namespace

int clip_stats(const ClipPanel& panel, int threads) {
  if (panel.wide != kFloat32 && panel.wide != kFloat64) return kBadDtype;
  panel.wide == kFloat32 ? stats<float>(panel, threads) : stats<double>(panel, threads);
  return kOk;
}

int clip_slopes(const ClipPanel& panel, int threads) {
  if (panel.wide != kFloat32 && panel.wide != kFloat64) return kBadDtype;
  panel.wide == kFloat32 ? slopes<float>(panel, threads) : slopes<double>(panel, threads);
  return kOk;
}

}  // namespace evaat
