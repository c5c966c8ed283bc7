// A rotation moves 16 bytes for every 6 flops, so the plan is that of a copy: every element is read once and written once in
// the order it lies in memory. Where tokens lie together (packed projections) heads are the inner loop, so that q and k of a
// token share its row of the table; where heads lie apart, each (clip, head) is one stream and the table stays in L2.
// The row kernels are functions of their own, compiled per instruction set, outside the OpenMP region.
#include "rope3d/rope3d_cpu.h"

#include <algorithm>

namespace evaat {
namespace {

using namespace rope;

// What a row kernel turns: `tokens` rows of the table, and under each of them the same token of `heads` heads.
struct Block {
  int64_t tokens, heads, in_n, in_h, out_n, out_h, pairs;  // strides in elements; pairs = D/2 = the table's row stride
  uint32_t flip;                                           // 0, or the sign bit, which turns every sine around
};

template <class T>
using Rows = void (*)(const T* in, T* out, const float* cos, const float* sin, const Block& block);

// Pairs first .. pairs - 1 of one token: the whole of the plain version, the tail of the others.
template <class T, bool interleaved>
inline void token_tail(const T* in, T* out, const float* cos, const float* sin, int64_t first, const Block& block) {
  const float sign = block.flip ? -1.0f : 1.0f;
  for (int64_t h = 0; h < block.heads; ++h, in += block.in_h, out += block.out_h)
    for (int64_t c = first; c < block.pairs; ++c) {
      const int64_t i = interleaved ? 2 * c : c, j = interleaved ? 2 * c + 1 : c + block.pairs;
      float a, b;
      turn_pair(widen(in[i]), widen(in[j]), cos[c], sign * sin[c], a, b);
      narrow(out[i], a), narrow(out[j], b);
    }
}

template <class T, bool interleaved>
void rows_plain(const T* in, T* out, const float* cos, const float* sin, const Block& block) {
  for (int64_t n = 0; n < block.tokens; ++n)
    token_tail<T, interleaved>(in + n * block.in_n, out + n * block.out_n, cos + n * block.pairs, sin + n * block.pairs, 0, block);
}

#ifdef EVAAT_X86
// U vectors' worth of pairs of one token, for every head: the table's part stays in registers over the heads. Then the loop
// over tokens. Both once per instruction set, as a target attribute cannot be a template argument.
#define ROWS(NAME, TARGET, V)                                                                                                  \
  template <class T, Layout kind, int U>                                                                                       \
  TARGET EVAAT_INLINE void NAME##_heads(const T* in, T* out, const float* cos, const float* sin, const Block& block) {         \
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
          V::F a, b;                                                                                                           \
          V::load_words(in + u * 2 * V::W, a, b);                                                                              \
          V::store_words(out + u * 2 * V::W, V::first(a, b, x[u], y[u]), V::add_product(a * y[u], b, x[u]));                   \
        } else if constexpr (kind == kPairs) {                                                                                 \
          V::store(out + u * V::W, V::turn_pairs(V::load(in + u * V::W), x[u], y[u]));                                         \
        } else {                                                                                                               \
          const V::F a = V::load(in + u * V::W), b = V::load(in + block.pairs + u * V::W);                                     \
          V::store(out + u * V::W, V::first(a, b, x[u], y[u]));                                                                \
          V::store(out + block.pairs + u * V::W, V::add_product(a * y[u], b, x[u]));                                           \
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

// Tokens [from, to) of one clip, `heads` heads of one tensor from head h on.
template <class T>
void turn(Rows<T> rows, const RopeTensor& x, const RopeTable<float>& table, int64_t b, int64_t h, int64_t heads, int64_t from, int64_t to,
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
int run(const RopeCall& call, const RopeTensor* x, int tensors, const RopeTable<float>& table, int threads) {
  const int64_t B = call.B, N = call.N, D = call.D, prefix = call.prefix;
  const Rows<T> rows = call.interleaved ? EVAAT_BEST(rows, T, true) : EVAAT_BEST(rows, T, false);
  const uint32_t flip = call.inverse ? 0x80000000u : 0;
  int64_t heads = 0;
  bool together = true;  // in every tensor, the heads of a token lie nearer than its neighbours
  for (int i = 0; i < tensors; ++i) {
    heads += x[i].heads;
    together = together && x[i].in_h < x[i].in_n;
  }
  threads = useful(threads, B * heads * N * D * int64_t(sizeof(T)));
  const int64_t group = table.stride_h ? 1 : kRopeGroup;  // heads that share a row of the table
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
  return kOk;
}

}  // namespace

int rope3d(const RopeCall& call, const RopeTensor* x, int tensors, const RopeTable<float>& table, int threads) {
  if (call.dtype == kFloat32) return run<float>(call, x, tensors, table, threads);
  if (call.dtype == kBFloat16) return run<BFloat>(call, x, tensors, table, threads);
  if (call.dtype == kFloat16) return run<Half>(call, x, tensors, table, threads);
  return kBadDtype;
}

}  // namespace evaat
