// What the CPU kernels of rope3d share: elements, vectors of each instruction set, and how pairs lie in them.
#pragma once
#include <type_traits>

#include "common/cpu.h"
#include "rope3d/rope3d.h"

#ifdef EVAAT_X86
#include <immintrin.h>
#endif

namespace evaat {
namespace rope {

// Heads that are turned together where each is a stream of its own: they share a row of the table. Measured on 12 heads of 785
// tokens: one 1.8 x, two 1.2 x, four 0.85 x, six 0.75 x the time of a copy (bfloat16, in place).
constexpr int64_t kRopeGroup = 6;

// (a, b) by an angle: the specification of every kernel.
EVAAT_INLINE void turn_pair(float a, float b, float cos, float sin, float& new_a, float& new_b) {
  new_a = a * cos - b * sin;
  new_b = b * cos + a * sin;
}

#ifdef EVAAT_X86
// One struct per instruction set: W floats, and how elements become floats and back.
#define IN512 EVAAT_AVX512 static EVAAT_INLINE
#define IN256 EVAAT_AVX2 static EVAAT_INLINE
struct Avx512 {
  static constexpr int W = 16;
  using F = __m512;
  IN512 F load(const float* p) { return _mm512_loadu_ps(p); }
  IN512 F load(const BFloat* p) {
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  IN512 F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  IN512 void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  IN512 void store(BFloat* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round(x), 16))); }
  IN512 void store(Half* p, F x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The upper half of each word becomes the bfloat16, to nearest even. A NaN passes: x86 makes, and bfloat16 inputs carry, NaNs
  // whose lower half is zero.
  IN512 __m512i round(F x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  IN512 F flip(F x, uint32_t sign) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int(sign))));
  }
  // p[0] p[0] p[1] p[1] ..: one value for both channels of a pair.
  IN512 F twice(const float* p) {
    const __m512i order = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
  }
  IN512 F turn_pairs(F x, F c, F s) { return _mm512_fmaddsub_ps(x, c, swap_pairs(x) * s); }
  IN512 F first(F a, F b, F c, F s) { return _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)); }
  IN512 F swap_pairs(F x) { return _mm512_permute_ps(x, 0xb1); }
  IN512 F add_product(F sum, F a, F b) { return _mm512_fmadd_ps(a, b, sum); }
  IN512 F subtract_product(F sum, F a, F b) { return _mm512_fnmadd_ps(a, b, sum); }
  // W pairs of bfloat16, one pair in each word: no shuffle is needed.
  IN512 void load_words(const BFloat* p, F& a, F& b) {
    __m512i words = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))));
  }
  IN512 void store_words(BFloat* p, F a, F b) {
    __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), low = _mm512_srli_epi32(round(a), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_and_si512(round(b), upper)));
  }
};

struct Avx2 {
  static constexpr int W = 8;
  using F = __m256;
  IN256 F load(const float* p) { return _mm256_loadu_ps(p); }
  IN256 F load(const BFloat* p) {
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  }
  IN256 F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  IN256 void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  IN256 void store(BFloat* p, F x) {
    __m256i words = _mm256_srli_epi32(round(x), 16);
    words = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x88);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(words));
  }
  IN256 void store(Half* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  IN256 __m256i round(F x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  IN256 F flip(F x, uint32_t sign) { return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(int(sign)))); }
  IN256 F twice(const float* p) {
    const __m256i order = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), order);
  }
  IN256 F turn_pairs(F x, F c, F s) { return _mm256_fmaddsub_ps(x, c, swap_pairs(x) * s); }
  IN256 F first(F a, F b, F c, F s) { return _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)); }
  IN256 F swap_pairs(F x) { return _mm256_permute_ps(x, 0xb1); }
  IN256 F add_product(F sum, F a, F b) { return _mm256_fmadd_ps(a, b, sum); }
  IN256 F subtract_product(F sum, F a, F b) { return _mm256_fnmadd_ps(a, b, sum); }
  IN256 void load_words(const BFloat* p, F& a, F& b) {
    __m256i words = _mm256_loadu_si256((const __m256i*)p);
    a = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))));
  }
  IN256 void store_words(BFloat* p, F a, F b) {
    __m256i upper = _mm256_set1_epi32(int(0xffff0000u)), low = _mm256_srli_epi32(round(a), 16);
    _mm256_storeu_si256((__m256i*)p, _mm256_or_si256(low, _mm256_and_si256(round(b), upper)));
  }
};
#endif

enum Layout { kSplit, kPairs, kWords };  // half-split | interleaved floats or halves | interleaved bfloat16

template <class T, bool interleaved>
constexpr Layout layout = !interleaved ? kSplit : sizeof(T) == 2 && !std::is_same<T, Half>::value ? kWords : kPairs;

}  // namespace rope
}  // namespace evaat
