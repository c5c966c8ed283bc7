// What is done to rows of features before and after the products: normalise, and the Jacobian of normalising. Sums over E are
// taken in double, in eight strands, so that their order is fixed and the compiler can vectorise them.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/cpu.h"
#include "pairwise/pairwise.h"

namespace evaat {
namespace {

constexpr int kStrands = 8;

template <class T>
EVAAT_INLINE double dot(const T* a, const T* b, int64_t E) {
  double s[kStrands] = {};
  int64_t e = 0;
  for (; e + kStrands <= E; e += kStrands)
    for (int k = 0; k < kStrands; ++k) s[k] += double(a[e + k]) * double(b[e + k]);
  for (int k = 0; e < E; ++e, ++k) s[k] += double(a[e]) * double(b[e]);
  return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

template <class T>
EVAAT_INLINE T clamped(T norm) {
  return norm < T(1e-8) ? T(1e-8) : norm;  // NaN stays NaN
}

template <class T, class X>
EVAAT_INLINE void unit_row(const X* x, T norm, int64_t E, T* unit) {
  const T divisor = clamped(norm);
  for (int64_t e = 0; e < E; ++e) unit[e] = T(widen(x[e])) / divisor;
}

template <class T, class X>
EVAAT_INLINE void normalise(const X* x, int64_t E, T* unit, T* norm) {
  for (int64_t e = 0; e < E; ++e) unit[e] = T(widen(x[e]));
  *norm = T(std::sqrt(dot(unit, unit, E)));
  const T divisor = clamped(*norm);
  for (int64_t e = 0; e < E; ++e) unit[e] /= divisor;  // unit_row would check whether its two rows overlap, and do one at a time
}

// a and b become the unit rows of one pair.
struct Prepare {
  template <class T, class X>
  static EVAAT_INLINE void run(const X* x, const X* y, int64_t E, T* a, T* b, T* norm_x, T* norm_y, T* diagonal) {
    normalise(x, E, a, norm_x);
    normalise(y, E, b, norm_y);
    *diagonal = T(dot(a, b, E));
  }
};

struct Finish {
  template <class T, class X>
  static EVAAT_INLINE void run(const X* x, T norm_x, const X* y, T norm_y, T slope, double factor, int64_t E, T* a, T* b,
                               T* gradient) {
    unit_row(x, norm_x, E, a);
    unit_row(y, norm_y, E, b);
    for (int64_t e = 0; e < E; ++e) gradient[e] += slope * b[e];
    const T along = T(dot(gradient, a, E)), scale = T(factor / double(norm_x));
    for (int64_t e = 0; e < E; ++e) gradient[e] = (gradient[e] - a[e] * along) * scale;
  }
};

template <class U, class T>
void store_row(const T* row, int64_t E, void* out, int64_t i) {
  if (!out) return;
  U* to = static_cast<U*>(out) + i * E;
  for (int64_t e = 0; e < E; ++e) narrow(to[e], row[e]);
}

template <class X, class T, class Body>
int each_pair_of(const PairFeatures& pairs, int threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> a(pairs.E), b(pairs.E);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs.N; ++i)
      body(i, static_cast<const X*>(pairs.video) + i * pairs.video_stride, static_cast<const X*>(pairs.text) + i * pairs.text_stride,
           a.data(), b.data());
  }
  return kOk;
}

// body(i, row of the video, row of the text, a, b) for every pair i, in parallel; a, b: scratch of a row each, of the type of the
// computation.
template <class Body>
int each_pair(const PairFeatures& pairs, int threads, Body body) {
  if (pairs.dtype == kFloat64 && pairs.wide == kFloat64) return each_pair_of<double, double>(pairs, threads, body);
  if (pairs.wide != kFloat32) return kBadDtype;
  if (pairs.dtype == kFloat32) return each_pair_of<float, float>(pairs, threads, body);
  if (pairs.dtype == kBFloat16) return each_pair_of<BFloat, float>(pairs, threads, body);
  return pairs.dtype == kFloat16 ? each_pair_of<Half, float>(pairs, threads, body) : kBadDtype;
}

}  // namespace

int pair_prepare(const PairFeatures& pairs, void* unit_video, void* unit_text, bool unit_bf16, int threads) {
  const int64_t N = pairs.N, E = pairs.E;
  return each_pair(pairs, threads, [=](int64_t i, const auto* v, const auto* t, auto* a, auto* b) {
    using T = std::remove_pointer_t<decltype(a)>;
    T* const norms = static_cast<T*>(pairs.norms) + i;
    run_best<Prepare>(v, t, E, a, b, norms, norms + N, norms + 2 * N);
    if (sizeof(T) == 4 && unit_bf16) {
      store_row<BFloat>(a, E, unit_video, i);
      store_row<BFloat>(b, E, unit_text, i);
    } else {
      store_row<T>(a, E, unit_video, i);
      store_row<T>(b, E, unit_text, i);
    }
  });
}

int pair_finish(const PairFeatures& pairs, bool of_text, const void* slope, void* gradient, double factor, int threads) {
  const int64_t N = pairs.N, E = pairs.E;
  return each_pair(pairs, threads, [=](int64_t i, const auto* v, const auto* t, auto* a, auto* b) {
    using T = std::remove_pointer_t<decltype(a)>;
    const T *norm = static_cast<const T*>(pairs.norms) + (of_text ? N : 0), *other = norm + (of_text ? -N : N);
    T* const row = static_cast<T*>(gradient) + i * E;
    if (norm[i] < T(1e-8))
      std::fill(row, row + E, T(0));
    else
      run_best<Finish>(of_text ? t : v, norm[i], of_text ? v : t, other[i], static_cast<const T*>(slope)[i], factor, E, a, b, row);
  });
}

}  // namespace evaat
