// A rotation moves 16 bytes for every 6 flops, so the plan is that of a copy: every element is read once and written once in
// the order it lies in memory. Where tokens lie together (packed projections) heads are the inner loop, so that q and k of a
// token share its row of the table; where heads lie apart, each (clip, head) is one stream and the table stays in L2.
// The row kernels are functions of their own, compiled per instruction set, outside the OpenMP region.
#include "rope3d.h"

#include <algorithm>
#include <type_traits>

#include "cpu.h"

#ifdef EVAAT_X86
#include <immintrin.h>
#endif

namespace evaat {
namespace {

// Heads that are turned together where each is a stream of its own: they share a row of the table. Measured on 12 heads of 785
// tokens: one 1.8 x, two 1.2 x, four 0.85 x, six 0.75 x the time of a copy (bfloat16, in place).
constexpr int64_t kGroup = 6;

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// What a row kernel turns: `tokens` rows of the table, and under each of them the same token of `heads` heads.
struct Block {
  int64_t tokens, heads, in_n, in_h, out_n, out_h, pairs;  // strides in elements; pairs = D/2 = the table's row stride
  uint32_t flip;                                           // 0, or the sign bit, which turns every sine around
};

template <class T>
using Rows = void (*)(const T* in, T* out, const float* cos, const float* sin, const Block& block);

inline float load(const float* p) { return *p; }
inline float load(const BFloat* p) { return bf16_to_float(p->bits); }
inline float load(const Half* p) { return half_to_float(p->bits); }
inline void store(float* p, float x) { *p = x; }
inline void store(BFloat* p, float x) { p->bits = float_to_bf16(x); }
inline void store(Half* p, float x) { p->bits = float_to_half(x); }

// Pairs first .. pairs - 1 of one token: the whole of the plain version, the tail of the others.
template <class T, bool interleaved>
inline void token_tail(const T* in, T* out, const float* cos, const float* sin, int64_t first, const Block& block) {
  const float sign = block.flip ? -1.0f : 1.0f;
  for (int64_t h = 0; h < block.heads; ++h, in += block.in_h, out += block.out_h)
    for (int64_t c = first; c < block.pairs; ++c) {
      const int64_t i = interleaved ? 2 * c : c, j = interleaved ? 2 * c + 1 : c + block.pairs;
      const float a = load(in + i), b = load(in + j), s = sign * sin[c];
      store(out + i, a * cos[c] - b * s);
      store(out + j, b * cos[c] + a * s);
    }
}

template <class T, bool interleaved>
void rows_plain(const T* in, T* out, const float* cos, const float* sin, const Block& block) {
  for (int64_t n = 0; n < block.tokens; ++n)
    token_tail<T, interleaved>(in + n * block.in_n, out + n * block.out_n, cos + n * block.pairs, sin + n * block.pairs, 0, block);
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
  EVAAT_AVX512 static INLINE F flip(F x, uint32_t sign) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int(sign))));
  }
  // p[0] p[0] p[1] p[1] ..: one value for both channels of a pair.
  EVAAT_AVX512 static INLINE F twice(const float* p) {
    const __m512i order = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
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
  EVAAT_AVX2 static INLINE F flip(F x, uint32_t sign) {
    return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(int(sign))));
  }
  EVAAT_AVX2 static INLINE F twice(const float* p) {
    const __m256i order = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), order);
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

enum Layout { kSplit, kPairs, kWords };  // half-split | interleaved floats or halves | interleaved bfloat16

template <class T, bool interleaved>
constexpr Layout layout = !interleaved ? kSplit : sizeof(T) == 2 && !std::is_same<T, Half>::value ? kWords : kPairs;

// U vectors' worth of pairs of one token, for every head: the table's part stays in registers over the heads. Then the loop
// over tokens. Both once per instruction set, as a target attribute cannot be a template argument.
#define ROWS(NAME, TARGET, V)                                                                                                  \
  template <class T, Layout kind, int U>                                                                                       \
  TARGET INLINE void NAME##_heads(const T* in, T* out, const float* cos, const float* sin, const Block& block) {               \
    V::F x[U], y[U];                                                                                                           \
    for (int u = 0; u < U; ++u) {                                                                                              \
      x[u] = kind == kPairs ? V::twice(cos + u * V::W / 2) : V::load(cos + u * V::W);                                          \
      y[u] = V::flip(kind == kPairs ? V::twice(sin + u * V::W / 2) : V::load(sin + u * V::W), block.flip);                     \
    }                                                                                                                          \
    for (int64_t h = 0; h < block.heads; ++h, in += block.in_h, out += block.out_h) {                                          \
      _Pragma("GCC unroll 8") for (int u = 0; u < U; ++u) {                                                                    \
        /* The next token, first where it goes and then where it comes from, which in place is there by then. Past the end */  \
        /* of memory a prefetch does nothing. */                                                                               \
        const int64_t at = u * (kind == kWords ? 2 : 1) * V::W;                                                                \
        __builtin_prefetch(out + block.out_n + at, 1);                                                                         \
        __builtin_prefetch(in + block.in_n + at, 0);                                                                           \
        if (kind == kSplit) __builtin_prefetch(out + block.out_n + block.pairs + at, 1);                                       \
        if (kind == kSplit) __builtin_prefetch(in + block.in_n + block.pairs + at, 0);                                         \
        if constexpr (kind == kWords) {                                                                                        \
          V::turn_words(in + u * 2 * V::W, out + u * 2 * V::W, x[u], y[u]);                                                    \
        } else if constexpr (kind == kPairs) {                                                                                 \
          V::store(out + u * V::W, V::turn_pairs(V::load(in + u * V::W), x[u], y[u]));                                         \
        } else {                                                                                                               \
          const V::F a = V::load(in + u * V::W), b = V::load(in + block.pairs + u * V::W);                                     \
          V::store(out + u * V::W, V::first(a, b, x[u], y[u]));                                                                \
          V::store(out + block.pairs + u * V::W, V::second(a, b, x[u], y[u]));                                                 \
        }                                                                                                                      \
      }                                                                                                                        \
    }                                                                                                                          \
  }                                                                                                                            \
  template <class T, bool interleaved>                                                                                         \
  TARGET void NAME(const T* in, T* out, const float* cos, const float* sin, const Block& block) {                              \
    constexpr Layout kind = layout<T, interleaved>;                                                                            \
    constexpr int64_t P = kind == kPairs ? V::W / 2 : V::W, step = interleaved ? 2 : 1, U = kind == kPairs ? 4 : 2;            \
    for (int64_t n = 0; n < block.tokens; ++n) {                                                                               \
      int64_t c = 0;                                                                                                           \
      for (; c + U * P <= block.pairs; c += U * P)                                                                             \
        NAME##_heads<T, kind, U>(in + step * c, out + step * c, cos + c, sin + c, block);                                      \
      for (; c + P <= block.pairs; c += P)                                                                                     \
        NAME##_heads<T, kind, 1>(in + step * c, out + step * c, cos + c, sin + c, block);                                      \
      if (c < block.pairs) token_tail<T, interleaved>(in, out, cos, sin, c, block);                                            \
      in += block.in_n, out += block.out_n, cos += block.pairs, sin += block.pairs;                                            \
    }                                                                                                                          \
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

// Tokens [from, to) of one clip, `heads` heads of one tensor from head h on.
template <class T>
void turn(Rows<T> rows, const RopeTensor& x, const RopeTable& table, int64_t b, int64_t h, int64_t heads, int64_t from, int64_t to,
          int64_t D, int64_t prefix, uint32_t flip) {
  const T* in = (const T*)x.in + b * x.in_b + h * x.in_h;
  T* out = (T*)x.out + b * x.out_b + h * x.out_h;
  if (in != out)
    for (int64_t n = from; n < std::min(to, prefix); ++n)
      for (int64_t i = 0; i < heads; ++i)
        std::memcpy(out + i * x.out_h + n * x.out_n, in + i * x.in_h + n * x.in_n, D * sizeof(T));
  const int64_t first = std::max(from, prefix), pairs = D / 2;
  if (first >= to) return;
  const int64_t row = b * table.stride_b + h * table.stride_h + (first - prefix) * pairs;
  const Block block{to - first, heads, x.in_n, x.in_h, x.out_n, x.out_h, pairs, flip};
  rows(in + first * x.in_n, out + first * x.out_n, table.cos + row, table.sin + row, block);
}

template <class T>
void run(const RopeTensor* x, int tensors, const RopeTable& table, int64_t B, int64_t N, int64_t D, int64_t prefix,
         bool interleaved, bool inverse, int threads) {
  const Rows<T> rows = choose<T>(interleaved);
  const uint32_t flip = inverse ? 0x80000000u : 0;
  int64_t heads = 0;
  bool together = true;  // in every tensor, the heads of a token lie nearer than its neighbours
  for (int i = 0; i < tensors; ++i) {
    heads += x[i].heads;
    together = together && x[i].in_h < x[i].in_n;
  }
  // Below some 32 KB a thread, waking it costs more than it saves.
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, B * heads * N * D * int64_t(sizeof(T)) >> 15)));
  const int64_t group = table.stride_h ? 1 : kGroup;  // heads that share a row of the table
  const int64_t groups[2] = {(x[0].heads + group - 1) / group, tensors > 1 ? (x[1].heads + group - 1) / group : 0};
  const int64_t streams = together ? B : B * (groups[0] + groups[1]);
  const int64_t wanted = std::max<int64_t>(1, (4 * threads + streams - 1) / streams);
  const int64_t chunk = std::max<int64_t>(16, (N + wanted - 1) / wanted), chunks = (N + chunk - 1) / chunk;
  const RopeTensor& last = x[tensors - 1];
  const int64_t used = last.heads * last.in_h, span = (const T*)last.in - (const T*)x[0].in + used, rest = last.in_n - span;
  const int64_t gap = span > 0 && rest > 0 && rest <= span ? rest * int64_t(sizeof(T)) : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < streams * chunks; ++item) {
    const int64_t from = item % chunks * chunk, to = std::min(N, from + chunk);
    int64_t stream = item / chunks;
    if (together) {
      const int64_t b = stream;
      for (int64_t n = from; n < to; ++n) {
        // The values of a packed projection lie between two tokens' queries and keys. Reading them too makes one linear stream,
        // which the hardware prefetches: 1.7 x the speed.
        const char* between = (const char*)((const T*)last.in + b * last.in_b + n * last.in_n + used);
        for (int64_t at = 0; at < gap; at += 64) __builtin_prefetch(between + at, 0);
        for (int i = 0; i < tensors; ++i) {
          const int64_t step = table.stride_h ? 1 : x[i].heads;
          for (int64_t h = 0; h < x[i].heads; h += step) turn<T>(rows, x[i], table, b, h, step, n, n + 1, D, prefix, flip);
        }
      }
      continue;
    }
    const int i = stream >= B * groups[0];
    if (i) stream -= B * groups[0];
    const int64_t b = stream / groups[i], h = stream % groups[i] * group;
    turn<T>(rows, x[i], table, b, h, std::min(group, x[i].heads - h), from, to, D, prefix, flip);
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
