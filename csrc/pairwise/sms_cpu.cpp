// The SMS epilogue. A panel of similarities is read once and overwritten by its slopes: about 30 vector operations per 16 pairs,
// so it is written in intrinsics, four rows at a time (the captions' vectors are loaded once for four videos, and the column sums
// stored once). Blocks of 1024 columns keep those vectors and any gathered labels in L1. A row's loss is added up in a fixed
// order whoever computes it, and the sums of slopes are integers: the result does not depend on the number of threads.
// Every level rounds as the specification does: products and sums are not fused.
#include <algorithm>
#include <cmath>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/cpu.h"
#include "pairwise/pairwise.h"

#ifdef EVAAT_X86
#if !defined(__clang__)  // GCC 12 warns of its own header: _mm512_undefined_ps is written as `x = x`
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace evaat {
namespace {

constexpr int kRows = 4;
constexpr int64_t kColumns = 1024;

constexpr bool writes(int mode) { return mode == kSlopes || mode == kWeighted; }

// Columns begin .. end - 1 of up to four rows. T: the type of the computation, S: that of the similarities.
template <class T, class S>
struct Block {
  int rows;
  int64_t begin, end;
  S* s[kRows];
  const T* label[kRows];     // label[r][i - begin]
  int64_t own[kRows];        // the column of the row's own pair
  T row_scale[kRows], row_diagonal[kRows], row_self[kRows];
  const T *col_scale, *diagonal, *self;
  const T* weight;           // kWeighted: what each pair's own loss counts
  T margin, relaxation, eps;
  int32_t* col_sum;
  double* col_loss;          // kEach
  double loss[kRows];        // out: sums over the block
  int32_t row_sum[kRows];
};

// One pair from one side: the penalty is added to loss, the slope returned.
template <class T, int rule>
inline T side(T self, T c, T own, T s, T margin, T relaxation, T eps, double& loss) {
  const T d = self - c, gap = own - s, m = margin * d - gap;
  const bool equal = std::abs(d) < eps, more = rule == kCode ? d > eps : d >= eps;
  const T near = rule == kCode ? m : -gap;
  if (rule == kCharades && d <= -eps) return 0;
  const T penalty = equal ? std::abs(near) - relaxation : more ? m : -m;
  if (penalty <= 0) return 0;  // false for NaN, which must reach the loss
  loss += double(penalty);
  return std::signbit(equal ? near : m) ? T(-1) : T(1);
}

template <class T, class S, int mode, int rule>
void block_plain(Block<T, S>& b, int64_t begin) {
  for (int r = 0; r < b.rows; ++r) {
    double loss = 0;
    int32_t sum = 0;
    for (int64_t i = begin; i < b.end; ++i) {
      if (i == b.own[r]) {
        if (writes(mode)) narrow(b.s[r][i], T(0));
        continue;
      }
      T s = widen(b.s[r][i]);
      if (b.col_scale) s = s * b.row_scale[r] * b.col_scale[i];
      const T c = b.label[r][i - b.begin];
      double column = 0;
      const T g1 = side<T, rule>(b.self[i], c, b.diagonal[i], s, b.margin, b.relaxation, b.eps, mode == kEach ? column : loss);
      const T g2 = side<T, rule>(b.row_self[r], c, b.row_diagonal[r], s, b.margin, b.relaxation, b.eps, loss);
      b.col_sum[i] += int32_t(g1);
      sum += int32_t(g2);
      if (mode == kEach) b.col_loss[i] += column;
      if (mode == kSlopes) narrow(b.s[r][i], g1 + g2);
      if (mode == kWeighted) narrow(b.s[r][i], g1 * b.weight[i] + g2 * b.weight[b.own[r]]);
    }
    b.loss[r] += loss;
    b.row_sum[r] += sum;
  }
}

#ifdef EVAAT_X86

template <int rule>
EVAAT_AVX512 inline __m512 side512(__m512 self, __m512 c, __m512 own, __m512 s, __m512 margin, __m512 relaxation, __m512 eps,
                                   __mmask16 keep, __m512& loss) {
  const __m512 sign = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
  const __m512 d = _mm512_sub_ps(self, c), gap = _mm512_sub_ps(own, s);
  __m512 m = _mm512_sub_ps(_mm512_mul_ps(margin, d), gap);
  const __mmask16 equal = _mm512_cmp_ps_mask(_mm512_abs_ps(d), eps, _CMP_LT_OQ);
  const __mmask16 less = _mm512_cmp_ps_mask(d, eps, rule == kCode ? _CMP_NGT_UQ : _CMP_NGE_UQ);
  if (rule == kCharades) keep &= ~_mm512_cmp_ps_mask(d, _mm512_xor_ps(eps, sign), _CMP_LE_OQ);
  if (rule != kCode) m = _mm512_mask_xor_ps(m, equal, gap, sign);
  __m512 penalty = _mm512_mask_xor_ps(m, less, m, sign);
  penalty = _mm512_mask_sub_ps(penalty, equal, _mm512_abs_ps(m), relaxation);
  const __mmask16 active = _mm512_mask_cmp_ps_mask(keep, penalty, _mm512_setzero_ps(), _CMP_NLE_UQ);  // NaN too
  loss = _mm512_mask_add_ps(loss, active, loss, penalty);
  // (m & sign) | one
  const __m512i slope = _mm512_maskz_ternarylogic_epi32(active, _mm512_castps_si512(m), _mm512_castps_si512(sign), _mm512_castps_si512(one), 0xea);
  return _mm512_castsi512_ps(slope);
}

EVAAT_AVX512 inline __m512 load512(const float* p, __mmask16 k) { return _mm512_maskz_loadu_ps(k, p); }
EVAAT_AVX512 inline __m512 load512(const BFloat* p, __mmask16 k) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
}
EVAAT_AVX512 inline void store512(float* p, __mmask16 k, __m512 g) { _mm512_mask_storeu_ps(p, k, g); }
EVAAT_AVX512 inline void store512(BFloat* p, __mmask16 k, __m512 g) {  // small integers: the lower half is zero
  _mm256_mask_storeu_epi16(p, k, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(g), 16)));
}

EVAAT_AVX512 inline void add512(double* p, __mmask8 k, __m256 x) {
  _mm512_mask_storeu_pd(p, k, _mm512_add_pd(_mm512_maskz_loadu_pd(k, p), _mm512_cvtps_pd(x)));
}

template <class S, int mode, int rule, int rows>
EVAAT_AVX512 void block_avx512(Block<float, S>& b) {
  const __m512 margin = _mm512_set1_ps(b.margin), relaxation = _mm512_set1_ps(b.relaxation), eps = _mm512_set1_ps(b.eps);
  __m512 loss[rows], sum[rows];
  int64_t first = b.own[0], last = b.own[0];
  for (int r = 0; r < rows; ++r) {
    loss[r] = sum[r] = _mm512_setzero_ps();
    first = std::min(first, b.own[r]);
    last = std::max(last, b.own[r]);
  }
  for (int64_t i = b.begin; i < b.end; i += 16) {
    const __mmask16 inside = b.end - i >= 16 ? __mmask16(0xffff) : __mmask16((1u << (b.end - i)) - 1);
    const __m512 self = load512(b.self + i, inside), diagonal = load512(b.diagonal + i, inside);
    const bool has_own = i <= last && i + 16 > first;
    __m512 column = _mm512_setzero_ps(), column_loss = column;
    for (int r = 0; r < rows; ++r) {
      __mmask16 keep = inside;
      if (has_own && b.own[r] >= i && b.own[r] < i + 16) keep &= __mmask16(~(1u << (b.own[r] - i)));
      __m512 s = load512(b.s[r] + i, inside);
      if (b.col_scale)
        s = _mm512_mul_ps(_mm512_mul_ps(s, _mm512_set1_ps(b.row_scale[r])), load512(b.col_scale + i, inside));
      const __m512 c = load512(b.label[r] + (i - b.begin), inside);
      __m512& caption_loss = mode == kEach ? column_loss : loss[r];
      const __m512 g1 = side512<rule>(self, c, diagonal, s, margin, relaxation, eps, keep, caption_loss);
      const __m512 g2 = side512<rule>(_mm512_set1_ps(b.row_self[r]), c, _mm512_set1_ps(b.row_diagonal[r]), s, margin, relaxation,
                                       eps, keep, loss[r]);
      column = _mm512_add_ps(column, g1);
      sum[r] = _mm512_add_ps(sum[r], g2);
      if (mode == kSlopes) store512(b.s[r] + i, inside, _mm512_add_ps(g1, g2));
      if constexpr (mode == kWeighted) {
        const __m512 of_row = _mm512_mul_ps(g2, _mm512_set1_ps(b.weight[b.own[r]]));
        store512(b.s[r] + i, inside, _mm512_add_ps(_mm512_mul_ps(g1, load512(b.weight + i, inside)), of_row));
      }
    }
    if (mode == kEach) {
      const __m256 high = _mm512_castps512_ps256(_mm512_shuffle_f32x4(column_loss, column_loss, 0xee));
      add512(b.col_loss + i, __mmask8(inside), _mm512_castps512_ps256(column_loss));
      add512(b.col_loss + i + 8, __mmask8(inside >> 8), high);
    }
    const __m512i total = _mm512_maskz_loadu_epi32(inside, b.col_sum + i);
    _mm512_mask_storeu_epi32(b.col_sum + i, inside, _mm512_add_epi32(total, _mm512_cvtps_epi32(column)));
  }
  for (int r = 0; r < rows; ++r) {
    b.loss[r] += double(_mm512_reduce_add_ps(loss[r]));
    b.row_sum[r] += int32_t(_mm512_reduce_add_ps(sum[r]));
  }
}

template <int rule>
EVAAT_AVX2 inline __m256 side256(__m256 self, __m256 c, __m256 own, __m256 s, __m256 margin, __m256 relaxation, __m256 eps,
                                 __m256 keep, __m256& loss) {
  const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
  const __m256 d = _mm256_sub_ps(self, c), gap = _mm256_sub_ps(own, s);
  __m256 m = _mm256_sub_ps(_mm256_mul_ps(margin, d), gap);
  const __m256 equal = _mm256_cmp_ps(_mm256_andnot_ps(sign, d), eps, _CMP_LT_OQ);
  const __m256 less = _mm256_cmp_ps(d, eps, rule == kCode ? _CMP_NGT_UQ : _CMP_NGE_UQ);
  if (rule == kCharades) keep = _mm256_andnot_ps(_mm256_cmp_ps(d, _mm256_xor_ps(eps, sign), _CMP_LE_OQ), keep);
  if (rule != kCode) m = _mm256_blendv_ps(m, _mm256_xor_ps(gap, sign), equal);
  __m256 penalty = _mm256_xor_ps(m, _mm256_and_ps(less, sign));
  penalty = _mm256_blendv_ps(penalty, _mm256_sub_ps(_mm256_andnot_ps(sign, m), relaxation), equal);
  const __m256 active = _mm256_and_ps(keep, _mm256_cmp_ps(penalty, _mm256_setzero_ps(), _CMP_NLE_UQ));
  loss = _mm256_add_ps(loss, _mm256_and_ps(active, penalty));
  return _mm256_and_ps(active, _mm256_or_ps(_mm256_and_ps(m, sign), one));
}

EVAAT_AVX2 inline __m256 load256(const float* p) { return _mm256_loadu_ps(p); }
EVAAT_AVX2 inline __m256 load256(const BFloat* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
EVAAT_AVX2 inline void store256(float* p, __m256 g) { _mm256_storeu_ps(p, g); }
EVAAT_AVX2 inline void store256(BFloat* p, __m256 g) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(g), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
EVAAT_AVX2 inline float sum256(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

EVAAT_AVX2 inline void add256(double* p, __m128 x) {
  _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), _mm256_cvtps_pd(x)));
}

// As block_avx512; the last columns, fewer than eight, are left to block_plain.
template <class S, int mode, int rule, int rows>
EVAAT_AVX2 void block_avx2(Block<float, S>& b) {
  const __m256 margin = _mm256_set1_ps(b.margin), relaxation = _mm256_set1_ps(b.relaxation), eps = _mm256_set1_ps(b.eps);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), ones = _mm256_set1_epi32(-1);
  __m256 loss[rows], sum[rows];
  for (int r = 0; r < rows; ++r) loss[r] = sum[r] = _mm256_setzero_ps();
  int64_t i = b.begin;
  for (; i + 8 <= b.end; i += 8) {
    const __m256 self = load256(b.self + i), diagonal = load256(b.diagonal + i);
    __m256 column = _mm256_setzero_ps(), column_loss = column;
    for (int r = 0; r < rows; ++r) {
      const int64_t own = b.own[r] - i;
      __m256 keep = _mm256_castsi256_ps(ones);
      if (own >= 0 && own < 8)
        keep = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(lane, _mm256_set1_epi32(int(own))), ones));
      __m256 s = load256(b.s[r] + i);
      if (b.col_scale) s = _mm256_mul_ps(_mm256_mul_ps(s, _mm256_set1_ps(b.row_scale[r])), load256(b.col_scale + i));
      const __m256 c = load256(b.label[r] + (i - b.begin));
      __m256& caption_loss = mode == kEach ? column_loss : loss[r];
      const __m256 g1 = side256<rule>(self, c, diagonal, s, margin, relaxation, eps, keep, caption_loss);
      const __m256 g2 = side256<rule>(_mm256_set1_ps(b.row_self[r]), c, _mm256_set1_ps(b.row_diagonal[r]), s, margin, relaxation,
                                       eps, keep, loss[r]);
      column = _mm256_add_ps(column, g1);
      sum[r] = _mm256_add_ps(sum[r], g2);
      if (mode == kSlopes) store256(b.s[r] + i, _mm256_add_ps(g1, g2));
      if constexpr (mode == kWeighted) {
        const __m256 of_row = _mm256_mul_ps(g2, _mm256_set1_ps(b.weight[b.own[r]]));
        store256(b.s[r] + i, _mm256_add_ps(_mm256_mul_ps(g1, load256(b.weight + i)), of_row));
      }
    }
    if (mode == kEach) {
      add256(b.col_loss + i, _mm256_castps256_ps128(column_loss));
      add256(b.col_loss + i + 4, _mm256_extractf128_ps(column_loss, 1));
    }
    __m256i* total = reinterpret_cast<__m256i*>(b.col_sum + i);
    _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), _mm256_cvtps_epi32(column)));
  }
  for (int r = 0; r < rows; ++r) {
    b.loss[r] += double(sum256(loss[r]));
    b.row_sum[r] += int32_t(sum256(sum[r]));
  }
  if (i < b.end) block_plain<float, S, mode, rule>(b, i);
}

#endif  // EVAAT_X86

template <class T, class S, int mode, int rule>
void block(Block<T, S>& b) {
#ifdef EVAAT_X86
  if constexpr (sizeof(T) == 4) {
    if (isa() == kAvx512 && b.rows == kRows) return block_avx512<S, mode, rule, kRows>(b);
    if (isa() == kAvx2 && b.rows == kRows) return block_avx2<S, mode, rule, kRows>(b);
  }
#endif
  block_plain<T, S, mode, rule>(b, b.begin);
}

template <class T, class L>
void read_labels(const PairLabels& labels, int64_t j, int64_t row, int64_t begin, int64_t end, T* out) {
  const auto [half, stride_row, stride_col] = labels.strides;
  const L* from = static_cast<const L*>(labels.table) + row * stride_row;
  const int64_t *index = labels.caption_index, *verb = labels.verb;
  for (int64_t i = begin; i < end; ++i) {
    const L* at = from + (index ? index[i] : i) * stride_col + (verb && verb[i] == verb[j] ? half : 0);
    if constexpr (std::is_same_v<L, uint8_t>)
      out[i - begin] = static_cast<const T*>(labels.values)[*at];
    else
      out[i - begin] = T(widen(*at));
  }
}

// The labels of row j in columns begin .. end - 1: where they lie, or gathered into `out`.
template <class T>
const T* labels_of(const PairLabels& labels, int wide_dtype, int64_t j, int64_t begin, int64_t end, T* out) {
  const int64_t row = labels.video_index ? labels.video_index[j] : j;
  if (labels.dtype == wide_dtype && labels.strides[2] == 1 && !labels.caption_index)
    return static_cast<const T*>(labels.table) + row * labels.strides[1] + begin;
  switch (labels.dtype) {
    case kFloat32: read_labels<T, float>(labels, j, row, begin, end, out); break;
    case kFloat64: read_labels<T, double>(labels, j, row, begin, end, out); break;
    case kBFloat16: read_labels<T, BFloat>(labels, j, row, begin, end, out); break;
    case kFloat16: read_labels<T, Half>(labels, j, row, begin, end, out); break;
    default: read_labels<T, uint8_t>(labels, j, row, begin, end, out);
  }
  return out;
}

template <class T, class S, int mode, int rule>
void panel_rows(const SmsStep& p, Panel panel, int threads) {
  const int64_t N = p.pairs.N, groups = (panel.rows + kRows - 1) / kRows;
  const T* scales = static_cast<const T*>(p.scales);
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    alignas(64) T gathered[kRows][kColumns];
    Block<T, S> b;
    b.margin = T(p.penalty.margin), b.relaxation = T(p.penalty.relaxation), b.eps = T(p.penalty.eps);
    b.diagonal = static_cast<const T*>(p.pairs.norms) + 2 * N, b.self = static_cast<const T*>(p.own);
    b.col_scale = scales ? scales + N : nullptr;
    b.weight = static_cast<const T*>(p.weight);
    b.col_sum = p.sums + (1 + thread) * N;
    b.col_loss = p.losses + (mode == kEach ? (1 + thread) * N : 0);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t top = group * kRows;
      b.rows = int(std::min<int64_t>(kRows, panel.rows - top));
      for (int r = 0; r < b.rows; ++r) {
        const int64_t j = panel.first + top + r;
        b.s[r] = static_cast<S*>(panel.s) + (top + r) * N;
        b.own[r] = j;
        b.row_diagonal[r] = b.diagonal[j], b.row_self[r] = b.self[j];
        b.row_scale[r] = scales ? scales[j] : T(1);
        b.loss[r] = 0, b.row_sum[r] = 0;
      }
      for (b.begin = 0; b.begin < N; b.begin = b.end) {
        b.end = std::min(N, b.begin + kColumns);
        for (int r = 0; r < b.rows; ++r) b.label[r] = labels_of<T>(p.labels, p.pairs.wide, b.own[r], b.begin, b.end, gathered[r]);
        block<T, S, mode, rule>(b);
      }
      for (int r = 0; r < b.rows; ++r) p.losses[b.own[r]] = b.loss[r], p.sums[b.own[r]] = b.row_sum[r];
    }
  }
}

template <class T, class S, int rule>
int panel_of_rule(const SmsStep& p, Panel panel, int threads) {
  switch (p.mode) {
    case kLoss: return panel_rows<T, S, kLoss, rule>(p, panel, threads), kOk;
    case kSlopes: return panel_rows<T, S, kSlopes, rule>(p, panel, threads), kOk;
    case kEach: return panel_rows<T, S, kEach, rule>(p, panel, threads), kOk;
    default: break;
  }
  if constexpr (sizeof(S) == sizeof(T)) return panel_rows<T, S, kWeighted, rule>(p, panel, threads), kOk;
  return kBadDtype;  // weighted slopes are no integers
}

template <class T, class S>
int panel_of(const SmsStep& p, Panel panel, int threads) {
  if (p.penalty.rule == kPaper) return panel_of_rule<T, S, kPaper>(p, panel, threads);
  return p.penalty.rule == kCharades ? panel_of_rule<T, S, kCharades>(p, panel, threads) : panel_of_rule<T, S, kCode>(p, panel, threads);
}

}  // namespace

int sms_panel(const SmsStep& step, Panel panel, int threads) {
  const int wide = step.pairs.wide;
  if (wide == kFloat64 && step.dtype == kFloat64) return panel_of<double, double>(step, panel, threads);
  if (wide == kFloat32 && step.dtype == kFloat32) return panel_of<float, float>(step, panel, threads);
  return wide == kFloat32 && step.dtype == kBFloat16 ? panel_of<float, BFloat>(step, panel, threads) : kBadDtype;
}

}  // namespace evaat
