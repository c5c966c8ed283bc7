// What is done to rows of features before and after the products: normalise, and the Jacobian of normalising. Sums over E are
// taken in double, in eight strands, so that their order is fixed and the compiler can vectorise them.
#include <algorithm>
#include <vector>

#include "pairwise/pairwise_cpu.h"

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
EVAAT_INLINE void normalise(const X* x, int64_t E, T* scratch, T* norm) {
  for (int64_t e = 0; e < E; ++e) scratch[e] = T(widen(x[e]));
  *norm = T(std::sqrt(dot(scratch, scratch, E)));
  const T divisor = clamped(*norm);
  for (int64_t e = 0; e < E; ++e) scratch[e] /= divisor;
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

template <class T, class X>
int prepare_all(PairFeatures video, PairFeatures text, int64_t N, int64_t E, T* norm_video, T* norm_text, T* diagonal,
                void* unit_video, void* unit_text, bool unit_bf16, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> a(E), b(E);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      const X* x = static_cast<const X*>(video.data) + i * video.stride;
      const X* y = static_cast<const X*>(text.data) + i * text.stride;
      run_best<Prepare>(x, y, E, a.data(), b.data(), norm_video + i, norm_text + i, diagonal + i);
      if constexpr (sizeof(T) == 4) {
        if (unit_bf16) {
          store_row<BFloat>(a.data(), E, unit_video, i);
          store_row<BFloat>(b.data(), E, unit_text, i);
          continue;
        }
      }
      store_row<T>(a.data(), E, unit_video, i);
      store_row<T>(b.data(), E, unit_text, i);
    }
  }
  return kOk;
}

template <class T, class X>
int finish_all(PairFeatures x, const T* norm_x, PairFeatures other, const T* norm_other, const T* slope, T* gradient,
               double factor, int64_t N, int64_t E, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> a(E), b(E);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      T* row = gradient + i * E;
      const X* from = static_cast<const X*>(x.data) + i * x.stride;
      const X* pair = static_cast<const X*>(other.data) + i * other.stride;
      if (norm_x[i] < T(1e-8))
        std::fill(row, row + E, T(0));
      else
        run_best<Finish>(from, norm_x[i], pair, norm_other[i], slope[i], factor, E, a.data(), b.data(), row);
    }
  }
  return kOk;
}

}  // namespace

int pair_prepare(int dtype, int wide, PairFeatures video, PairFeatures text, int64_t N, int64_t E, void* norm_video, void* norm_text,
                 void* diagonal, void* unit_video, void* unit_text, bool unit_bf16, int threads) {
  auto run = [&](auto x, auto t) {
    using X = decltype(x);
    using T = decltype(t);
    return prepare_all<T, X>(video, text, N, E, (T*)norm_video, (T*)norm_text, (T*)diagonal, unit_video, unit_text, unit_bf16, threads);
  };
  if (dtype == kFloat64 && wide == kFloat64) return run(double(), double());
  if (wide != kFloat32) return kBadDtype;
  if (dtype == kFloat32) return run(float(), float());
  if (dtype == kBFloat16) return run(BFloat(), float());
  return dtype == kFloat16 ? run(Half(), float()) : kBadDtype;
}

int pair_finish(int dtype, int wide, PairFeatures x, const void* norm_x, PairFeatures other, const void* norm_other,
                const void* slope, void* gradient, double factor, int64_t N, int64_t E, int threads) {
  auto run = [&](auto from, auto t) {
    using X = decltype(from);
    using T = decltype(t);
    return finish_all<T, X>(x, (const T*)norm_x, other, (const T*)norm_other, (const T*)slope, (T*)gradient, factor, N, E, threads);
  };
  if (dtype == kFloat64 && wide == kFloat64) return run(double(), double());
  if (wide != kFloat32) return kBadDtype;
  if (dtype == kFloat32) return run(float(), float());
  if (dtype == kBFloat16) return run(BFloat(), float());
  return dtype == kFloat16 ? run(Half(), float()) : kBadDtype;
}

}  // namespace evaat
