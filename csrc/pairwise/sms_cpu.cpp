// The SMS epilogue. A panel of similarities is read once and overwritten by its slopes: about 30 vector operations per 16 pairs,
// so it is written in intrinsics, four rows at a time (the captions' vectors are loaded once for four videos, and the column sums
// stored once). Blocks of 1024 columns keep those vectors and any gathered labels in L1. A row's loss is added up in a fixed
// order whoever computes it, and the sums of slopes are integers: the result does not depend on the number of threads.
// Every level rounds as the specification does: products and sums are not fused.
#include <algorithm>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "pairwise/pairwise_cpu.h"

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

// Vectors of W floats and masks of as many lanes. masked_tail: whether what is loaded and stored under a mask leaves the other
// lanes' memory alone, so that a last, partial vector can be had. Slopes are stored in bfloat16 as small integers, whose lower half
// is zero.
struct Avx512 {
  static constexpr int W = 16;
  static constexpr bool masked_tail = true;
  using F = __m512;
  using Mask = __mmask16;
  IN512 Mask first(int64_t n) { return n >= W ? Mask(0xffff) : Mask((1u << n) - 1); }
  IN512 Mask only(int64_t lane) { return Mask(1u << lane); }
  IN512 Mask both(Mask a, Mask b) { return a & b; }
  IN512 Mask but(Mask a, Mask b) { return a & ~b; }
  template <int how>
  IN512 Mask compare(F a, F b) { return _mm512_cmp_ps_mask(a, b, how); }
  IN512 F select(Mask k, F a, F b) { return _mm512_mask_blend_ps(k, b, a); }
  IN512 F where(Mask k, F x) { return _mm512_maskz_mov_ps(k, x); }
  IN512 F flip_where(Mask k, F x) { return _mm512_mask_xor_ps(x, k, x, fill(-0.0f)); }
  IN512 F fill(float x) { return _mm512_set1_ps(x); }
  IN512 F abs(F x) { return _mm512_abs_ps(x); }
  IN512 F sign(F x) { return _mm512_or_ps(_mm512_and_ps(x, fill(-0.0f)), fill(1.0f)); }
  IN512 F load(const float* p, Mask k) { return _mm512_maskz_loadu_ps(k, p); }
  IN512 F load(const BFloat* p, Mask k) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
  }
  IN512 void store(float* p, Mask k, F x) { _mm512_mask_storeu_ps(p, k, x); }
  IN512 void store(BFloat* p, Mask k, F x) {
    _mm256_mask_storeu_epi16(p, k, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16)));
  }
  IN512 void add(int32_t* p, Mask k, F x) {
    _mm512_mask_storeu_epi32(p, k, _mm512_add_epi32(_mm512_maskz_loadu_epi32(k, p), _mm512_cvtps_epi32(x)));
  }
  IN512 void add(double* p, Mask k, F x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    _mm512_mask_storeu_pd(p, __mmask8(k), _mm512_add_pd(_mm512_maskz_loadu_pd(__mmask8(k), p), low));
    _mm512_mask_storeu_pd(p + 8, __mmask8(k >> 8), _mm512_add_pd(_mm512_maskz_loadu_pd(__mmask8(k >> 8), p + 8), high));
  }
  IN512 float sum(F x) { return _mm512_reduce_add_ps(x); }
};

struct Avx2 {
  static constexpr int W = 8;
  static constexpr bool masked_tail = false;
  using F = __m256;
  using Mask = __m256;
  IN256 Mask first(int64_t) { return _mm256_castsi256_ps(_mm256_set1_epi32(-1)); }
  IN256 Mask only(int64_t lane) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(int(lane))));
  }
  IN256 Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  IN256 Mask but(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
  template <int how>
  IN256 Mask compare(F a, F b) { return _mm256_cmp_ps(a, b, how); }
  IN256 F select(Mask k, F a, F b) { return _mm256_blendv_ps(b, a, k); }
  IN256 F where(Mask k, F x) { return _mm256_and_ps(k, x); }
  IN256 F flip_where(Mask k, F x) { return _mm256_xor_ps(x, _mm256_and_ps(k, fill(-0.0f))); }
  IN256 F fill(float x) { return _mm256_set1_ps(x); }
  IN256 F abs(F x) { return _mm256_andnot_ps(fill(-0.0f), x); }
  IN256 F sign(F x) { return _mm256_or_ps(_mm256_and_ps(x, fill(-0.0f)), fill(1.0f)); }
  IN256 F load(const float* p, Mask) { return _mm256_loadu_ps(p); }
  IN256 F load(const BFloat* p, Mask) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  IN256 void store(float* p, Mask, F x) { _mm256_storeu_ps(p, x); }
  IN256 void store(BFloat* p, Mask, F x) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  IN256 void add(int32_t* p, Mask, F x) {
    __m256i* at = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), _mm256_cvtps_epi32(x)));
  }
  IN256 void add(double* p, Mask, F x) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), low));
    _mm256_storeu_pd(p + 4, _mm256_add_pd(_mm256_loadu_pd(p + 4), high));
  }
  IN256 float sum(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
};

namespace avx512 {
#define TARGET EVAAT_AVX512
using V = Avx512;
#include "pairwise/sms_block.h"
}  // namespace avx512
namespace avx2 {
#define TARGET EVAAT_AVX2
using V = Avx2;
#include "pairwise/sms_block.h"
}  // namespace avx2

#endif  // EVAAT_X86

template <class T, class S, int mode, int rule>
void block(Block<T, S>& b) {
#ifdef EVAAT_X86
  if constexpr (sizeof(T) == 4) {
    if (isa() == kAvx512 && b.rows == kRows) return avx512::block<S, mode, rule>(b);
    if (isa() == kAvx2 && b.rows == kRows) return avx2::block<S, mode, rule>(b);
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
