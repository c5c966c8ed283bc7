// The two sweeps of InfoNCE and EgoNCE. Row statistics belong to one thread each; column statistics are carried from panel to
// panel by threads that own ranges of columns, so every sum has one order, whatever the number of threads. exp is a polynomial
// that the compiler vectorises: libm's would take longer than the products. Positive pairs are few, so their exponentials are
// taken only in blocks of 32 columns that have one.
#include <algorithm>
#include <limits>
#include <vector>

#include "pairwise/pairwise_cpu.h"

namespace evaat {
namespace {

constexpr int64_t kColumns = 256, kBlock = kMaskBlock;

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

EVAAT_INLINE bool any_positive(const uint8_t* mask) {
  uint64_t word[kBlock / 8];
  std::memcpy(word, mask, kBlock);
  return (word[0] | word[1] | word[2] | word[3]) != 0;
}

// mask[i], N of them and zeros up to a multiple of kBlock: whether caption i is a positive of video j.
struct RowMask {
  static EVAAT_INLINE void run(const PairPositives* from, int64_t j, int64_t N, uint8_t* mask) {
    std::memset(mask, 0, size_t((N + kBlock - 1) / kBlock * kBlock));
    if (from->dense) {
      const uint8_t* row = from->dense + j * from->stride_row;
      if (from->stride_col == 1)
        std::memcpy(mask, row, size_t(N));
      else
        for (int64_t i = 0; i < N; ++i) mask[i] = row[i * from->stride_col];
    } else {
      mark<1>(from->verbs, from->verb_words, j, N, mask);
      mark<2>(from->nouns, from->noun_words, j, N, mask);
      for (int64_t i = 0; i < N; ++i) mask[i] = mask[i] == 3;
    }
    mask[j] = 1;
  }

  // Sets `bit` of mask[i] where rows j and i share a class. A caption has few classes, so most words are skipped.
  template <uint8_t bit>
  static EVAAT_INLINE void mark(const int32_t* words, int64_t count, int64_t j, int64_t N, uint8_t* mask) {
    for (int64_t w = 0; w < count; ++w) {
      const int32_t* word = words + w * N;
      const int32_t mine = word[j];
      if (mine == 0) continue;
      for (int64_t i = 0; i < N; ++i) mask[i] |= uint8_t((word[i] & mine) != 0 ? bit : 0);
    }
  }
};

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

// The same of the positive columns.
struct RowPositives {
  template <class T>
  static EVAAT_INLINE void run(const T* s, const uint8_t* mask, int64_t N, T scale, double* largest, double* sum) {
    T most = -std::numeric_limits<T>::infinity();
    double whole = 0;
    for (int64_t begin = 0; begin < N; begin += kBlock) {
      if (!any_positive(mask + begin)) continue;
      for (int64_t i = begin; i < std::min(N, begin + kBlock); ++i) {
        const T x = scale * s[i];
        most = mask[i] && x > most ? x : most;
      }
    }
    for (int64_t begin = 0; begin < N; begin += kBlock) {
      if (!any_positive(mask + begin)) continue;
#pragma omp simd reduction(+ : whole)
      for (int64_t i = begin; i < std::min(N, begin + kBlock); ++i) {
        const double part = double(exp_negative(scale * s[i] - most));
        whole += mask[i] ? part : 0;
      }
    }
    *largest = double(most);
    *sum = whole;
  }
};

// Carries a column's sum from relative to `largest` to relative to `top`, and adds this panel's part.
template <class T>
EVAAT_INLINE void carry(T top, double part, double* largest, double* sum) {
  *sum *= double(exp_negative(T(*largest) - top));  // 0 times exp(-inf), as this computes it, in the first panel
  *sum += part;
  *largest = double(top);
}

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
    for (int64_t i = 0; i < count; ++i) carry(top[i], part[i], largest + i, sum + i);
  }
};

// The same of the positive rows; `stride`: of the masks.
struct ColumnPositives {
  template <class T>
  static EVAAT_INLINE void run(const T* s, const uint8_t* mask, int64_t stride, int64_t rows, int64_t N, int64_t count, T scale,
                               double* largest, double* sum) {
    T top[kColumns];
    double part[kColumns];
    for (int64_t i = 0; i < count; ++i) top[i] = T(largest[i]), part[i] = 0;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t begin = 0; begin < count; begin += kBlock) {
        if (!any_positive(mask + j * stride + begin)) continue;
        for (int64_t i = begin; i < std::min(count, begin + kBlock); ++i) {
          const T x = scale * s[j * N + i];
          top[i] = mask[j * stride + i] && x > top[i] ? x : top[i];
        }
      }
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t begin = 0; begin < count; begin += kBlock) {
        if (!any_positive(mask + j * stride + begin)) continue;
        for (int64_t i = begin; i < std::min(count, begin + kBlock); ++i) {
          const double here = double(exp_negative(scale * s[j * N + i] - top[i]));
          part[i] += mask[j * stride + i] ? here : 0;
        }
      }
    for (int64_t i = 0; i < count; ++i)
      if (top[i] > -std::numeric_limits<T>::infinity()) carry(top[i], part[i], largest + i, sum + i);
  }
};

// The log-sum-exp of a row, or of every column: its largest term, and the weight over the sum relative to that.
template <class T>
struct Total {
  T largest, inverse;
};
template <class T>
struct Totals {
  const T *largest, *inverse;
};

// What is left to learn: 1 - positives / all, without loss where it is small and the largest term is the same.
inline double rest(const LogSumExp& all, const LogSumExp& positive, int64_t i) {
  const double shift = positive.largest[i] - all.largest[i];
  return (all.sum[i] - positive.sum[i] * (shift == 0 ? 1.0 : std::exp(shift))) / all.sum[i];
}

// s becomes the slopes, where each pair is its only positive, whose own slope is `own_slope`.
struct RowSlopes {
  template <class T>
  static EVAAT_INLINE void run(T* s, int64_t N, int64_t own, T scale, T own_slope, Total<T> row, Totals<T> columns, double* slope) {
    const double pair = double(s[own]);
    double whole = 0;
#pragma omp simd reduction(+ : whole)
    for (int64_t i = 0; i < N; ++i) {
      const T x = s[i], logit = scale * x;
      const T here = exp_negative(logit - row.largest) * row.inverse + exp_negative(logit - columns.largest[i]) * columns.inverse[i];
      whole += double(here) * double(x);
      s[i] = here;
    }
    *slope = whole + (double(own_slope) - double(s[own])) * pair;
    s[own] = own_slope;
  }
};

// The same, where the positives are those of the mask: e / all - e / positives = -e / positives * rest for each e of them, the
// right side of which loses nothing; positive_*.inverse has the rest in it.
struct RowSlopesOfMask {
  template <class T>
  static EVAAT_INLINE void run(T* s, const uint8_t* mask, int64_t N, T scale, Total<T> row, Totals<T> columns, Total<T> positive_row,
                               Totals<T> positive_columns, double* slope) {
    double whole = 0;
    for (int64_t begin = 0; begin < N; begin += kBlock) {
      const int64_t end = std::min(N, begin + kBlock);
      T here[kBlock];
      for (int64_t i = begin; i < end; ++i) {
        const T logit = scale * s[i];
        here[i - begin] = exp_negative(logit - row.largest) * row.inverse + exp_negative(logit - columns.largest[i]) * columns.inverse[i];
      }
      if (any_positive(mask + begin))
        for (int64_t i = begin; i < end; ++i) {
          const T logit = scale * s[i];
          const T learned = exp_negative(logit - positive_row.largest) * positive_row.inverse +
                            exp_negative(logit - positive_columns.largest[i]) * positive_columns.inverse[i];
          here[i - begin] = mask[i] ? -learned : here[i - begin];
        }
#pragma omp simd reduction(+ : whole)
      for (int64_t i = begin; i < end; ++i) {
        whole += double(here[i - begin]) * double(s[i]);
        s[i] = here[i - begin];
      }
    }
    *slope = whole;
  }
};

template <class T>
int stats(const ContrastStep& p, Panel panel, int threads) {
  const T *s = static_cast<const T*>(panel.s), scale = T(p.scale);
  const int64_t stride = (p.N + kBlock - 1) / kBlock * kBlock;
  uint8_t* const masks = p.positives.mask;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t j = panel.first + r;
    run_best<RowStats>(s + r * p.N, p.N, scale, p.row().largest + j, p.row().sum + j);
    if (masks) {
      run_best<RowMask>(&p.positives, j, p.N, masks + r * stride);
      run_best<RowPositives>(s + r * p.N, static_cast<const uint8_t*>(masks + r * stride), p.N, scale, p.positive_row().largest + j,
                             p.positive_row().sum + j);
    } else {
      p.positive_row().largest[j] = p.positive_column().largest[j] = double(scale * s[r * p.N + j]);
      p.positive_row().sum[j] = p.positive_column().sum[j] = 1;
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < p.N; i += kColumns) {
    const int64_t count = std::min(kColumns, p.N - i);
    run_best<ColumnStats>(s + i, panel.rows, p.N, count, scale, p.column().largest + i, p.column().sum + i);
    if (masks)
      run_best<ColumnPositives>(s + i, static_cast<const uint8_t*>(masks + i), stride, panel.rows, p.N, count, scale,
                                p.positive_column().largest + i, p.positive_column().sum + i);
  }
  return kOk;
}

// Every column's total in the type of the computation.
template <class T>
struct Columns {
  std::vector<T> largest, inverse;
  Columns(const ContrastStep& p, const LogSumExp& from, bool positive) : largest(p.N), inverse(p.N) {
    for (int64_t i = 0; i < p.N; ++i) {
      const double weight = (p.weight ? p.weight[i] : 1) * (positive ? rest(p.column(), from, i) : 1);
      largest[i] = T(from.largest[i]), inverse[i] = T(weight / from.sum[i]);
    }
  }
  Totals<T> view() const { return {largest.data(), inverse.data()}; }
};

template <class T>
int slopes(const ContrastStep& p, Panel panel, int threads) {
  T *s = static_cast<T*>(panel.s), scale = T(p.scale);
  const int64_t stride = (p.N + kBlock - 1) / kBlock * kBlock;
  uint8_t* const masks = p.positives.mask;
  const Columns<T> columns(p, p.column(), false), positive_columns(p, p.positive_column(), true);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t j = panel.first + r;
    const double weight = p.weight ? p.weight[j] : 1;
    const double left = weight * rest(p.row(), p.positive_row(), j);
    const auto total = [j](const LogSumExp& from, double of) { return Total<T>{T(from.largest[j]), T(of / from.sum[j])}; };
    if (masks) {
      run_best<RowMask>(&p.positives, j, p.N, masks + r * stride);
      run_best<RowSlopesOfMask>(s + r * p.N, static_cast<const uint8_t*>(masks + r * stride), p.N, scale, total(p.row(), weight),
                                columns.view(), total(p.positive_row(), left), positive_columns.view(), p.row_slope + j);
    } else {
      const T own_slope = T(-(left + weight * rest(p.column(), p.positive_column(), j)));
      run_best<RowSlopes>(s + r * p.N, p.N, j, scale, own_slope, total(p.row(), weight), columns.view(), p.row_slope + j);
    }
  }
  return kOk;
}

}  // namespace

int contrast_stats(const ContrastStep& step, Panel panel, int threads) {
  if (step.wide == kFloat32) return stats<float>(step, panel, threads);
  return step.wide == kFloat64 ? stats<double>(step, panel, threads) : kBadDtype;
}

int contrast_slopes(const ContrastStep& step, Panel panel, int threads) {
  if (step.wide == kFloat32) return slopes<float>(step, panel, threads);
  return step.wide == kFloat64 ? slopes<double>(step, panel, threads) : kBadDtype;
}

}  // namespace evaat
