// A rotation moves 16 bytes for every 6 flops, so the plan is that of a copy: every element is read once and written once in
// the order it lies in memory. Where tokens lie together (packed projections) heads are the inner loop, so that q and k of a
// token share its row of the table; where heads lie apart, each (clip, head) is one stream and the table stays in L2.
// The row kernels are functions of their own, compiled per instruction set, outside the OpenMP region.
#include "rope3d.h"

#include <algorithm>

#include "cpu.h"

#ifdef EVAAT_X86
#include <immintrin.h>
#endif

namespace evaat {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// `count` rows: row i is at in + i * in_stride, its cosines at cos + i * table_stride. pairs = D/2. flip is 0, or the sign bit
// that turns every sine around.
template <class T>
using Rows = void (*)(const T* in, T* out, const float* cos, const float* sin, int64_t count, int64_t in_stride,
                      int64_t out_stride, int64_t table_stride, int64_t pairs, uint32_t flip);

inline float load(const float* p) { return *p; }
inline float load(const BFloat* p) { return bf16_to_float(p->bits); }
inline float load(const Half* p) { return half_to_float(p->bits); }
inline void store(float* p, float x) { *p = x; }
inline void store(BFloat* p, float x) { p->bits = float_to_bf16(x); }
inline void store(Half* p, float x) { p->bits = float_to_half(x); }

// Pairs first .. pairs - 1 of one row: the whole of the plain version, the tail of the others.
template <class T, bool interleaved>
inline void row_tail(const T* in, T* out, const float* cos, const float* sin, int64_t first, int64_t pairs, uint32_t flip) {
  const float sign = flip ? -1.0f : 1.0f;
  for (int64_t c = first; c < pairs; ++c) {
    const int64_t i = interleaved ? 2 * c : c, j = interleaved ? 2 * c + 1 : c + pairs;
    const float a = load(in + i), b = load(in + j), s = sign * sin[c];
    store(out + i, a * cos[c] - b * s);
    store(out + j, b * cos[c] + a * s);
  }
}

template <class T, bool interleaved>
void rows_plain(const T* in, T* out, const float* cos, const float* sin, int64_t count, int64_t in_stride, int64_t out_stride,
                int64_t table_stride, int64_t pairs, uint32_t flip) {
  for (int64_t i = 0; i < count; ++i, in += in_stride, out += out_stride, cos += table_stride, sin += table_stride)
    row_tail<T, interleaved>(in, out, cos, sin, 0, pairs, flip);
}

#ifdef EVAAT_X86
#define INLINE inline __attribute__((always_inline))

// One struct per instruction set: W floats, and how elements become floats and back.
struct Avx512 {
  static constexpr int W = 16;
  using F = __m512;
  EVAAT_AVX512 static INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  EVAAT_AVX512 static INLINE F load(const BFloat* p) {
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  EVAAT_AVX512 static INLINE F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  EVAAT_AVX512 static INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  EVAAT_AVX512 static INLINE void store(BFloat* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round(x), 16)));
  }
  EVAAT_AVX512 static INLINE void store(Half* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The upper half of each word becomes the bfloat16, to nearest even. A NaN passes: x86 makes, and bfloat16 inputs carry, NaNs
  // whose lower half is zero.
  EVAAT_AVX512 static INLINE __m512i round(F x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  EVAAT_AVX512 static INLINE F flipped(const float* p, uint32_t flip) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(flip))));
  }
  // p[0] p[0] p[1] p[1] ..: one value for both channels of a pair.
  EVAAT_AVX512 static INLINE F twice(const float* p, uint32_t flip) {
    const __m512i order = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    __m512 both = _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(both), _mm512_set1_epi32(int(flip))));
  }
  EVAAT_AVX512 static INLINE F turn_pairs(F x, F c, F s) {
    return _mm512_fmaddsub_ps(x, c, _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), s));
  }
  EVAAT_AVX512 static INLINE F first(F a, F b, F c, F s) { return _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)); }
  EVAAT_AVX512 static INLINE F second(F a, F b, F c, F s) { return _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)); }
  // W pairs of bfloat16, one pair in each word: no shuffle is needed.
  EVAAT_AVX512 static INLINE void turn_words(const BFloat* in, BFloat* out, F c, F s) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    __m512i words = _mm512_loadu_si512(in);
    F a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), b = _mm512_castsi512_ps(_mm512_and_si512(words, upper));
    __m512i low = _mm512_srli_epi32(round(first(a, b, c, s)), 16);
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_and_si512(round(second(a, b, c, s)), upper)));
  }
};

struct Avx2 {
  static constexpr int W = 8;
  using F = __m256;
  EVAAT_AVX2 static INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  EVAAT_AVX2 static INLINE F load(const BFloat* p) {
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  }
  EVAAT_AVX2 static INLINE F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  EVAAT_AVX2 static INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  EVAAT_AVX2 static INLINE void store(BFloat* p, F x) {
    __m256i words = _mm256_srli_epi32(round(x), 16);
    words = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x88);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(words));
  }
  EVAAT_AVX2 static INLINE void store(Half* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  EVAAT_AVX2 static INLINE __m256i round(F x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  EVAAT_AVX2 static INLINE F flipped(const float* p, uint32_t flip) {
    return _mm256_xor_ps(_mm256_loadu_ps(p), _mm256_castsi256_ps(_mm256_set1_epi32(int(flip))));
  }
  EVAAT_AVX2 static INLINE F twice(const float* p, uint32_t flip) {
    const __m256i order = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    __m256 both = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), order);
    return _mm256_xor_ps(both, _mm256_castsi256_ps(_mm256_set1_epi32(int(flip))));
  }
  EVAAT_AVX2 static INLINE F turn_pairs(F x, F c, F s) {
    return _mm256_fmaddsub_ps(x, c, _mm256_mul_ps(_mm256_permute_ps(x, 0xb1), s));
  }
  EVAAT_AVX2 static INLINE F first(F a, F b, F c, F s) { return _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)); }
  EVAAT_AVX2 static INLINE F second(F a, F b, F c, F s) { return _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)); }
  EVAAT_AVX2 static INLINE void turn_words(const BFloat* in, BFloat* out, F c, F s) {
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    __m256i words = _mm256_loadu_si256((const __m256i*)in);
    F a = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), b = _mm256_castsi256_ps(_mm256_and_si256(words, upper));
    __m256i low = _mm256_srli_epi32(round(first(a, b, c, s)), 16);
    _mm256_storeu_si256((__m256i*)out, _mm256_or_si256(low, _mm256_and_si256(round(second(a, b, c, s)), upper)));
  }
};

inline constexpr bool is_bfloat(const BFloat*) { return true; }
inline constexpr bool is_bfloat(const void*) { return false; }

// The loop over rows, once per instruction set: a target attribute cannot be a template argument.
#define ROWS(NAME, TARGET, V)                                                                                                   \
  template <class T, bool interleaved>                                                                                          \
  TARGET void NAME(const T* in, T* out, const float* cos, const float* sin, int64_t count, int64_t in_stride,                   \
                   int64_t out_stride, int64_t table_stride, int64_t pairs, uint32_t flip) {                                    \
    constexpr bool words = is_bfloat((const T*)nullptr);                                                                        \
    for (int64_t i = 0; i < count; ++i, in += in_stride, out += out_stride, cos += table_stride, sin += table_stride) {         \
      int64_t c = 0;                                                                                                            \
      if constexpr (!interleaved) {                                                                                             \
        for (; c + V::W <= pairs; c += V::W) {                                                                                  \
          const V::F a = V::load(in + c), b = V::load(in + pairs + c), x = V::load(cos + c), y = V::flipped(sin + c, flip);     \
          V::store(out + c, V::first(a, b, x, y));                                                                              \
          V::store(out + pairs + c, V::second(a, b, x, y));                                                                     \
        }                                                                                                                       \
      } else if constexpr (words) {                                                                                             \
        for (; c + V::W <= pairs; c += V::W) V::turn_words(in + 2 * c, out + 2 * c, V::load(cos + c), V::flipped(sin + c, flip)); \
      } else {                                                                                                                  \
        for (; c + V::W / 2 <= pairs; c += V::W / 2)                                                                            \
          V::store(out + 2 * c, V::turn_pairs(V::load(in + 2 * c), V::twice(cos + c, 0), V::twice(sin + c, flip)));             \
      }                                                                                                                         \
      row_tail<T, interleaved>(in, out, cos, sin, c, pairs, flip);                                                              \
    }                                                                                                                           \
  }

ROWS(rows_avx512, EVAAT_AVX512, Avx512)
ROWS(rows_avx2, EVAAT_AVX2, Avx2)
#endif

template <class T>
Rows<T> choose(bool interleaved) {
#ifdef EVAAT_X86
  if (isa() == kAvx512) return interleaved ? rows_avx512<T, true> : rows_avx512<T, false>;
  if (isa() == kAvx2) return interleaved ? rows_avx2<T, true> : rows_avx2<T, false>;
#endif
  return interleaved ? rows_plain<T, true> : rows_plain<T, false>;
}

// Tokens [from, to) of one clip and heads [h, h + heads) of one tensor; heads > 1 makes the heads the inner loop.
template <class T>
void block(Rows<T> rows, const RopeTensor& x, const RopeTable& table, int64_t b, int64_t h, int64_t heads, int64_t from,
           int64_t to, int64_t D, int64_t prefix, uint32_t flip) {
  const T* in = (const T*)x.in + b * x.in_b + h * x.in_h;
  T* out = (T*)x.out + b * x.out_b + h * x.out_h;
  const int64_t pairs = D / 2;
  if (in != out)
    for (int64_t n = from; n < std::min(to, prefix); ++n)
      for (int64_t i = 0; i < heads; ++i)
        std::memcpy(out + i * x.out_h + n * x.out_n, in + i * x.in_h + n * x.in_n, D * sizeof(T));
  const int64_t first = std::max(from, prefix);
  if (first >= to) return;
  const int64_t offset = b * table.stride_b + h * table.stride_h + (first - prefix) * pairs;
  if (heads == 1) {
    rows(in + first * x.in_n, out + first * x.out_n, table.cos + offset, table.sin + offset, to - first, x.in_n, x.out_n, pairs,
         pairs, flip);
    return;
  }
  for (int64_t n = first; n < to; ++n) {
    const int64_t row = offset + (n - first) * pairs;
    rows(in + n * x.in_n, out + n * x.out_n, table.cos + row, table.sin + row, heads, x.in_h, x.out_h, table.stride_h, pairs,
         flip);
  }
}

template <class T>
void run(const RopeTensor* x, int tensors, const RopeTable& table, int64_t B, int64_t N, int64_t D, int64_t prefix,
         bool interleaved, bool inverse, int threads) {
  const Rows<T> rows = choose<T>(interleaved);
  const uint32_t flip = inverse ? 0x80000000u : 0;
  int64_t heads = 0;
  bool tokens_apart = true;  // a token's heads lie together in every tensor
  for (int i = 0; i < tensors; ++i) {
    heads += x[i].heads;
    tokens_apart = tokens_apart && x[i].in_h < x[i].in_n;
  }
  // Below 32 KB or so per thread, starting a thread costs more than it saves.
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, B * heads * N * D * int64_t(sizeof(T)) >> 15)));
  const int64_t streams = tokens_apart ? B : B * heads;
  const int64_t wanted = std::max<int64_t>(1, (4 * threads + streams - 1) / streams);
  const int64_t chunk = std::max<int64_t>(16, (N + wanted - 1) / wanted), chunks = (N + chunk - 1) / chunk;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < streams * chunks; ++item) {
    const int64_t from = item % chunks * chunk, to = std::min(N, from + chunk);
    int64_t stream = item / chunks;
    if (tokens_apart) {
      for (int64_t n = from; n < to; ++n)
        for (int i = 0; i < tensors; ++i) block<T>(rows, x[i], table, stream, 0, x[i].heads, n, n + 1, D, prefix, flip);
      continue;
    }
    int i = 0;
    if (stream >= B * x[0].heads) stream -= B * x[0].heads, i = 1;
    block<T>(rows, x[i], table, stream / x[i].heads, stream % x[i].heads, 1, from, to, D, prefix, flip);
  }
}

}  // namespace

int rope3d(int dtype, const RopeTensor* x, int tensors, const RopeTable& table, int64_t B, int64_t N, int64_t D, int64_t prefix,
           bool interleaved, bool inverse, int threads) {
  if (dtype == kFloat32)
    run<float>(x, tensors, table, B, N, D, prefix, interleaved, inverse, threads);
  else if (dtype == kBFloat16)
    run<BFloat>(x, tensors, table, B, N, D, prefix, interleaved, inverse, threads);
  else if (dtype == kFloat16)
    run<Half>(x, tensors, table, B, N, D, prefix, interleaved, inverse, threads);
  else
    return kBadDtype;
  return kOk;
}

}  // namespace evaat
