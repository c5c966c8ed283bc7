// The rotation of a gradient and, in the same pass, the slopes of its angles. For a pair (a, b) of x and its (g_a, g_b) the two
// products a g_a + b g_b and a g_b - b g_a are summed over heads in float32; what they give with sine and cosine, times the
// token's position, is summed over tokens in float64. That is where torch changes from float32 to float64, too.
#include <algorithm>

#include "rope3d/rope3d_cpu.h"

namespace evaat {
namespace {

using namespace rope;

constexpr int64_t kMostPairs = 128;

// Heads of one token; out is the rotated gradient.
struct Token {
  int64_t heads, grad_h, out_h, x_h, pairs;
};

// Sums over heads, for every pair c from `first` on: dot[c] of a g_a + b g_b, cross[c] of a g_b - b g_a.
template <class T>
using Rows = void (*)(int64_t first, const T* grad, T* out, const T* x, const float* cos, const float* sin, float* dot, float* cross,
                      const Token& token);

template <class T, bool interleaved>
void rows_plain(int64_t first, const T* grad, T* out, const T* x, const float* cos, const float* sin, float* dot, float* cross,
                const Token& token) {
  for (int64_t c = first; c < token.pairs; ++c) {
    const int64_t i = interleaved ? 2 * c : c, j = interleaved ? 2 * c + 1 : c + token.pairs;
    dot[c] = cross[c] = 0;
    for (int64_t h = 0; h < token.heads; ++h) {
      const T *from = grad + h * token.grad_h, *saved = x + h * token.x_h;
      T* to = out + h * token.out_h;
      const float g_a = widen(from[i]), g_b = widen(from[j]), a = widen(saved[i]), b = widen(saved[j]);
      float new_a, new_b;
      turn_pair(g_a, g_b, cos[c], sin[c], new_a, new_b);
      narrow(to[i], new_a), narrow(to[j], new_b);
      dot[c] += a * g_a + b * g_b;
      cross[c] += a * g_b - b * g_a;
    }
  }
}

#ifdef EVAAT_X86
// P pairs at a time, for every head: their cosines, sines and sums stay in registers.
#define ROWS(NAME, TARGET, V)                                                                                                  \
  template <class T, Layout kind>                                                                                              \
  TARGET EVAAT_INLINE void NAME##_pair(const T* p, int64_t pairs, V::F& a, V::F& b) {                                          \
    if constexpr (kind == kWords)                                                                                              \
      V::load_words(p, a, b);                                                                                                  \
    else                                                                                                                       \
      a = V::load(p), b = V::load(p + pairs);                                                                                  \
  }                                                                                                                            \
  template <class T, bool interleaved>                                                                                         \
  TARGET void NAME(int64_t first, const T* grad, T* out, const T* x, const float* cos, const float* sin, float* dot, float* cross, \
                   const Token& token) {                                                                                       \
    constexpr Layout kind = layout<T, interleaved>;                                                                            \
    constexpr int64_t P = kind == kPairs ? V::W / 2 : V::W, step = interleaved ? 2 : 1;                                        \
    int64_t c = first;                                                                                                         \
    for (; c + P <= token.pairs; c += P) {                                                                                     \
      const T *from = grad + step * c, *saved = x + step * c;                                                                  \
      T* to = out + step * c;                                                                                                  \
      const V::F cosine = kind == kPairs ? V::twice(cos + c) : V::load(cos + c);                                               \
      const V::F sine = kind == kPairs ? V::twice(sin + c) : V::load(sin + c);                                                 \
      V::F dots = {}, crosses = {};                                                                                            \
      for (int64_t h = 0; h < token.heads; ++h, from += token.grad_h, saved += token.x_h, to += token.out_h) {                 \
        if constexpr (kind == kPairs) {                                                                                        \
          const V::F g = V::load(from), ab = V::load(saved);                                                                   \
          V::store(to, V::turn_pairs(g, cosine, sine));                                                                        \
          dots = V::add_product(dots, ab, g);                                                                                  \
          crosses = V::add_product(crosses, ab, V::swap_pairs(g));                                                             \
        } else {                                                                                                               \
          V::F g_a, g_b, a, b;                                                                                                 \
          NAME##_pair<T, kind>(from, token.pairs, g_a, g_b);                                                                   \
          NAME##_pair<T, kind>(saved, token.pairs, a, b);                                                                      \
          const V::F new_a = V::first(g_a, g_b, cosine, sine), new_b = V::add_product(g_a * sine, g_b, cosine);                \
          if constexpr (kind == kWords)                                                                                        \
            V::store_words(to, new_a, new_b);                                                                                  \
          else                                                                                                                 \
            V::store(to, new_a), V::store(to + token.pairs, new_b);                                                            \
          dots = dots + V::add_product(a * g_a, b, g_b);                                                                       \
          crosses = crosses + V::subtract_product(a * g_b, b, g_a);                                                            \
        }                                                                                                                      \
      }                                                                                                                        \
      if constexpr (kind == kPairs) {                                                                                          \
        float both[2][V::W]; /* a g_a, b g_b, .. and a g_b, b g_a, .. */                                                       \
        V::store(both[0], dots), V::store(both[1], crosses);                                                                   \
        for (int64_t i = 0; i < P; ++i) {                                                                                      \
          dot[c + i] = both[0][2 * i] + both[0][2 * i + 1];                                                                    \
          cross[c + i] = both[1][2 * i] - both[1][2 * i + 1];                                                                  \
        }                                                                                                                      \
      } else {                                                                                                                 \
        V::store(dot + c, dots), V::store(cross + c, crosses);                                                                 \
      }                                                                                                                        \
    }                                                                                                                          \
    if (c < token.pairs) rows_plain<T, interleaved>(c, grad, out, x, cos, sin, dot, cross, token);                             \
  }

ROWS(rows_avx512, EVAAT_AVX512, Avx512)
ROWS(rows_avx2, EVAAT_AVX2, Avx2)
#endif

template <class T>
int run(const RopeCall& call, const RopeGradient* x, int tensors, const RopeTable<double>& table, const RopePositions& positions,
        double* partial, int threads) {
  const int64_t B = call.B, N = call.N, D = call.D, prefix = call.prefix;
  const bool inverse = call.inverse;
  const Rows<T> rows = call.interleaved ? EVAAT_BEST(rows, T, true) : EVAAT_BEST(rows, T, false);
  const int64_t pairs = D / 2, chunks = (N - prefix + kRopeChunk - 1) / kRopeChunk, items = B * chunks;
  const bool per_head = table.stride_h != 0;
  const int64_t size = (per_head ? x[0].grad.heads : 1) * 3 * pairs;
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, std::min<int64_t>(threads, items)))) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t b = item / chunks, from = prefix + item % chunks * kRopeChunk, to = std::min(N, from + kRopeChunk);
    std::fill_n(partial + item * size, size, 0.0);
    for (int i = 0; i < tensors; ++i) {
      const RopeTensor& g = x[i].grad;
      const RopeSaved& s = x[i].saved;
      const T *in = (const T*)g.in + b * g.in_b, *saved = (const T*)s.x + b * s.x_b;
      T* out = (T*)g.out + b * g.out_b;
      if (from == prefix)
        for (int64_t h = 0; h < g.heads; ++h)
          for (int64_t n = 0; n < prefix; ++n)
            std::memcpy(out + h * g.out_h + n * g.out_n, in + h * g.in_h + n * g.in_n, D * sizeof(T));
      const int64_t group = per_head ? 1 : g.in_h < g.in_n ? g.heads : kRopeGroup;
      for (int64_t h = 0; h < g.heads; h += group) {
        const Token token{std::min(group, g.heads - h), g.in_h, g.out_h, s.x_h, pairs};
        double* sum = partial + item * size + (per_head ? h * 3 * pairs : 0);
        for (int64_t n = from; n < to; ++n) {
          float cosine[kMostPairs], sine[kMostPairs], dot[kMostPairs], cross[kMostPairs];
          const int64_t row = b * table.stride_b + h * table.stride_h + (n - prefix) * pairs;
          const double *cos = table.cos + row, *sin = table.sin + row;
          for (int64_t c = 0; c < pairs; ++c) cosine[c] = float(cos[c]), sine[c] = float(inverse ? -sin[c] : sin[c]);
          rows(0, in + h * g.in_h + n * g.in_n, out + h * g.out_h + n * g.out_n, saved + h * s.x_h + n * s.x_n, cosine, sine, dot,
               cross, token);
          const float* at = positions.rows + b * positions.stride_b + (n - prefix) * 3;
          for (int64_t c = 0; c < pairs; ++c) {
            const double slope = cos[c] * double(cross[c]) + (inverse ? -sin[c] : sin[c]) * double(dot[c]);
            for (int axis = 0; axis < 3; ++axis) sum[axis * pairs + c] += double(at[axis]) * slope;
          }
        }
      }
    }
  }
  return kOk;
}

}  // namespace

int rope3d_freqs(const RopeCall& call, const RopeGradient* x, int tensors, const RopeTable<double>& table,
                 const RopePositions& positions, double* partial, int threads) {
  if (call.dtype == kFloat32) return run<float>(call, x, tensors, table, positions, partial, threads);
  if (call.dtype == kBFloat16) return run<BFloat>(call, x, tensors, table, positions, partial, threads);
  if (call.dtype == kFloat16) return run<Half>(call, x, tensors, table, positions, partial, threads);
  return kBadDtype;
}

}  // namespace evaat
