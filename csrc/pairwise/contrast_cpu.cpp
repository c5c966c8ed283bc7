// The two sweeps of InfoNCE and EgoNCE. Row statistics belong to one thread each; column statistics are carried from panel to
// panel by threads that own ranges of columns, so every sum has one order, whatever the number of threads. Positive pairs are
// few, so their exponentials are taken only in blocks of 32 columns that have one.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/exp_cpu.h"
#include "pairwise/pairwise.h"

namespace evaat {
namespace {

constexpr int64_t kColumns = 256, kBlock = kMaskBlock;

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
      const uint8_t* row = from->dense + j * from->strides[0];
      if (from->strides[1] == 1)
        std::memcpy(mask, row, size_t(N));
      else
        for (int64_t i = 0; i < N; ++i) mask[i] = row[i * from->strides[1]];
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

// One row's total; masked: of its positive columns.
template <bool masked>
struct RowStats {
  template <class T>
  static EVAAT_INLINE void run(const T* s, const uint8_t* mask, int64_t N, T scale, double* largest, double* sum) {
    const int64_t block = masked ? kBlock : N;
    T most = -std::numeric_limits<T>::infinity();
    double whole = 0;
    for (int64_t begin = 0; begin < N; begin += block) {
      if (masked && !any_positive(mask + begin)) continue;
      const int64_t end = std::min(N, begin + block);
#pragma omp simd reduction(max : most)
      for (int64_t i = begin; i < end; ++i) {
        const T x = scale * s[i];
        most = (!masked || mask[i]) && x > most ? x : most;
      }
    }
    for (int64_t begin = 0; begin < N; begin += block) {
      if (masked && !any_positive(mask + begin)) continue;
      const int64_t end = std::min(N, begin + block);
#pragma omp simd reduction(+ : whole)
      for (int64_t i = begin; i < end; ++i) {
        const double part = double(exp_within(scale * s[i] - most));
        whole += !masked || mask[i] ? part : 0;
      }
    }
    *largest = double(most);
    *sum = whole;
  }
};

// Carries a column's sum from relative to `largest` to relative to `top`, and adds this panel's part.
template <class T>
EVAAT_INLINE void carry(T top, double part, double* largest, double* sum) {
  *sum *= double(exp_within(T(*largest) - top));  // 0 times exp(-inf), as this computes it, in the first panel
  *sum += part;
  *largest = double(top);
}

// One panel's part of `count` <= kColumns columns; masked: of their positive rows. `stride`: of the masks.
template <bool masked>
struct ColumnStats {
  template <class T>
  static EVAAT_INLINE void run(const T* s, const uint8_t* mask, int64_t stride, int64_t rows, int64_t N, int64_t count, T scale,
                               double* largest, double* sum) {
    const int64_t block = masked ? kBlock : kColumns;
    T top[kColumns];
    double part[kColumns];
    for (int64_t i = 0; i < count; ++i) top[i] = T(largest[i]), part[i] = 0;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t begin = 0; begin < count; begin += block) {
        if (masked && !any_positive(mask + j * stride + begin)) continue;
        for (int64_t i = begin; i < std::min(count, begin + block); ++i) {
          const T x = scale * s[j * N + i];
          top[i] = (!masked || mask[j * stride + i]) && x > top[i] ? x : top[i];
        }
      }
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t begin = 0; begin < count; begin += block) {
        if (masked && !any_positive(mask + j * stride + begin)) continue;
        for (int64_t i = begin; i < std::min(count, begin + block); ++i) {
          const double here = double(exp_within(scale * s[j * N + i] - top[i]));
          part[i] += !masked || mask[j * stride + i] ? here : 0;
        }
      }
    for (int64_t i = 0; i < count; ++i)
      if (!masked || top[i] > -std::numeric_limits<T>::infinity()) carry(top[i], part[i], largest + i, sum + i);
  }
};

// The log-sum-exp of one row: its largest term, and the weight over the sum relative to that.
template <class T>
struct Total {
  T largest, inverse;
};

// What is left to learn: 1 - positives / all, without loss where it is small and the largest term is the same.
inline double rest(const LogSumExp& all, const LogSumExp& positive, int64_t i) {
  const double shift = positive.largest[i] - all.largest[i];
  return (all.sum[i] - positive.sum[i] * (shift == 0 ? 1.0 : std::exp(shift))) / all.sum[i];
}

// The totals of all columns; of their positives the inverses have the rest in them.
template <class T>
struct Columns {
  std::vector<T> largest, inverse;
  Columns(const ContrastStep& p, const LogSumExp& from, bool positive) : largest(p.N), inverse(p.N) {
    for (int64_t i = 0; i < p.N; ++i) {
      const double weight = (p.weight ? p.weight[i] : 1) * (positive ? rest(p.column(), from, i) : 1);
      largest[i] = T(from.largest[i]), inverse[i] = T(weight / from.sum[i]);
    }
  }
};

// What the probabilities of a row and of column i, times what each counts, add up to.
template <class T>
EVAAT_INLINE T both(T logit, Total<T> row, const T* largest, const T* inverse, int64_t i) {
  return exp_within(logit - row.largest) * row.inverse + exp_within(logit - largest[i]) * inverse[i];
}

// s becomes the slopes, where each pair is its only positive, whose own slope is `own_slope`.
struct RowSlopes {
  template <class T>
  static EVAAT_INLINE void run(T* s, int64_t N, int64_t own, T scale, T own_slope, Total<T> row, const Columns<T>* columns,
                               double* slope) {
    const T *largest = columns->largest.data(), *inverse = columns->inverse.data();
    const double pair = double(s[own]);
    double whole = 0;
#pragma omp simd reduction(+ : whole)
    for (int64_t i = 0; i < N; ++i) {
      const T x = s[i], here = both(scale * x, row, largest, inverse, i);
      whole += double(here) * double(x);
      s[i] = here;
    }
    *slope = whole + (double(own_slope) - double(s[own])) * pair;
    s[own] = own_slope;
  }
};

// The same, where the positives are those of the mask: e / all - e / positives = -e / positives * rest for each e of them, the
// right side of which loses nothing.
struct RowSlopesOfMask {
  template <class T>
  static EVAAT_INLINE void run(T* s, const uint8_t* mask, int64_t N, T scale, Total<T> row, const Columns<T>* columns,
                               Total<T> positive_row, const Columns<T>* positives, double* slope) {
    const T *largest = columns->largest.data(), *inverse = columns->inverse.data();
    const T *most = positives->largest.data(), *share = positives->inverse.data();
    double whole = 0;
    for (int64_t begin = 0; begin < N; begin += kBlock) {
      const int64_t end = std::min(N, begin + kBlock);
      T here[kBlock];
      for (int64_t i = begin; i < end; ++i) here[i - begin] = both(scale * s[i], row, largest, inverse, i);
      if (any_positive(mask + begin))
        for (int64_t i = begin; i < end; ++i)
          here[i - begin] = mask[i] ? -both(scale * s[i], positive_row, most, share, i) : here[i - begin];
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
  const LogSumExp row = p.row(), column = p.column(), positive_row = p.positive_row(), positive_column = p.positive_column();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t j = panel.first + r;
    uint8_t* const mask = masks + (masks ? r * stride : 0);
    run_best<RowStats<false>>(s + r * p.N, mask, p.N, scale, row.largest + j, row.sum + j);
    if (masks) {
      run_best<RowMask>(&p.positives, j, p.N, mask);
      run_best<RowStats<true>>(s + r * p.N, mask, p.N, scale, positive_row.largest + j, positive_row.sum + j);
    } else {
      positive_row.largest[j] = positive_column.largest[j] = double(scale * s[r * p.N + j]);
      positive_row.sum[j] = positive_column.sum[j] = 1;
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < p.N; i += kColumns) {
    const int64_t count = std::min(kColumns, p.N - i);
    uint8_t* const mask = masks + (masks ? i : 0);
    run_best<ColumnStats<false>>(s + i, mask, stride, panel.rows, p.N, count, scale, column.largest + i, column.sum + i);
    if (masks)
      run_best<ColumnStats<true>>(s + i, mask, stride, panel.rows, p.N, count, scale, positive_column.largest + i,
                                  positive_column.sum + i);
  }
  return kOk;
}

template <class T>
int slopes(const ContrastStep& p, Panel panel, int threads) {
  T *s = static_cast<T*>(panel.s), scale = T(p.scale);
  const int64_t stride = (p.N + kBlock - 1) / kBlock * kBlock;
  uint8_t* const masks = p.positives.mask;
  const Columns<T> columns(p, p.column(), false), positives(p, p.positive_column(), true);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t j = panel.first + r;
    const double weight = p.weight ? p.weight[j] : 1, left = weight * rest(p.row(), p.positive_row(), j);
    const auto total = [j](const LogSumExp& from, double of) { return Total<T>{T(from.largest[j]), T(of / from.sum[j])}; };
    if (masks) {
      run_best<RowMask>(&p.positives, j, p.N, masks + r * stride);
      run_best<RowSlopesOfMask>(s + r * p.N, masks + r * stride, p.N, scale, total(p.row(), weight), &columns,
                                total(p.positive_row(), left), &positives, p.row_slope + j);
    } else {
      const T own_slope = T(-(left + weight * rest(p.column(), p.positive_column(), j)));
      run_best<RowSlopes>(s + r * p.N, p.N, j, scale, own_slope, total(p.row(), weight), &columns, p.row_slope + j);
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
