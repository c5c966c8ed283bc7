// A thread turns the pairs of one 16-byte access (two, where a pair's channels lie D/2 apart) for every head of a group, so that
// cosines and sines are loaded once for kHeads heads. Where rows or strides are no multiple of 16 bytes it takes one pair. A third
// tensor goes along in the same launch: all of its tokens are prefix.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.h"
#include "rope3d/rope3d.h"

namespace evaat {
namespace {

__device__ float wide(float x) { return x; }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float wide(__half x) { return __half2float(x); }
__device__ void narrow(float x, float& out) { out = x; }
__device__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

// (a, b) by an angle: the specification of every kernel.
__device__ void turn_pair(float a, float b, float cos, float sin, float& new_a, float& new_b) {
  new_a = a * cos - b * sin;
  new_b = b * cos + a * sin;
}

template <class T, int n>
struct alignas(sizeof(T) * n) Vector {
  T at[n];
};

// P pairs as they lie in memory: one vector of both channels, or one of each.
template <class T, bool interleaved, int P>
struct Pairs {
  Vector<T, interleaved ? 2 * P : P> x;
  Vector<T, interleaved ? 1 : P> y;

  __device__ void load(const T* from, int64_t pairs) {
    x = *reinterpret_cast<const decltype(x)*>(from);
    if constexpr (!interleaved) y = *reinterpret_cast<const decltype(y)*>(from + pairs);
  }
  __device__ float a(int i) const { return wide(x.at[interleaved ? 2 * i : i]); }
  __device__ float b(int i) const {
    if constexpr (interleaved)
      return wide(x.at[2 * i + 1]);
    else
      return wide(y.at[i]);
  }
};

template <class T, bool interleaved, int P>
__device__ void store(T* to, int64_t pairs, const float (&a)[P], const float (&b)[P]) {
  if constexpr (interleaved) {
    Vector<T, 2 * P> x;
#pragma unroll
    for (int i = 0; i < P; ++i) narrow(a[i], x.at[2 * i]), narrow(b[i], x.at[2 * i + 1]);
    *reinterpret_cast<Vector<T, 2 * P>*>(to) = x;
  } else {
    Vector<T, P> x, y;
#pragma unroll
    for (int i = 0; i < P; ++i) narrow(a[i], x.at[i]), narrow(b[i], y.at[i]);
    *reinterpret_cast<Vector<T, P>*>(to) = x, *reinterpret_cast<Vector<T, P>*>(to + pairs) = y;
  }
}

template <int P>
__device__ void load_table(const float* from, float (&to)[P]) {
  constexpr int step = P < 4 ? P : 4;
#pragma unroll
  for (int i = 0; i < P; i += step) {
    const auto x = *reinterpret_cast<const Vector<float, step>*>(from + i);
#pragma unroll
    for (int j = 0; j < step; ++j) to[i + j] = x.at[j];
  }
}

// P pairs make one access where this holds: 16 bytes for interleaved pairs, and for each half of the others.
template <class T>
constexpr int pairs_of(bool interleaved) {
  return interleaved ? 8 / int(sizeof(T)) : 16 / int(sizeof(T));
}

bool aligned(const void* p, int64_t size, int64_t b, int64_t h, int64_t n) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && b * size % 16 == 0 && h * size % 16 == 0 && n * size % 16 == 0;
}

bool aligned(const RopeTensor& x, int64_t size) {
  return aligned(x.in, size, x.in_b, x.in_h, x.in_n) && aligned(x.out, size, x.out_b, x.out_h, x.out_n);
}

constexpr int kThreads = 256, kHeads = 4;
constexpr int64_t kMostClips = 65535;  // of a grid's third dimension; a block strides over the rest

struct Rotation {
  RopeTensor x[3];
  RopeTable<float> table;
  int64_t B, N, pairs, prefix, first;  // tokens below `first` are not visited
  int groups[3], heads_of_group;  // the groups before each tensor's
  float sign;  // of every sine
};

// block: accesses of a row, and tokens. grid: blocks of tokens; groups of heads of one tensor after the other; clips.
template <class T, bool interleaved, int P>
__global__ void __launch_bounds__(kThreads) rope3d_kernel(const Rotation r) {
  const int c = int(threadIdx.x) * P, channel = interleaved ? 2 * c : c;
  const int64_t n = r.first + int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= r.N) return;
  const int group = int(blockIdx.y), which = group < r.groups[1] ? 0 : group < r.groups[2] ? 1 : 2;
  const RopeTensor& x = r.x[which];
  const int from = (group - r.groups[which]) * r.heads_of_group, heads = min(int(x.heads) - from, r.heads_of_group);
  const bool turned = n >= r.prefix && which < 2;
  for (int64_t b = blockIdx.z; b < r.B; b += gridDim.z) {
    float cos[P], sin[P];
    if (turned) {
      const int64_t row = b * r.table.stride_b + from * r.table.stride_h + (n - r.prefix) * r.pairs + c;
      load_table(r.table.cos + row, cos), load_table(r.table.sin + row, sin);
#pragma unroll
      for (int i = 0; i < P; ++i) sin[i] *= r.sign;
    }
    const T* in = static_cast<const T*>(x.in) + b * x.in_b + n * x.in_n + from * x.in_h + channel;
    T* out = static_cast<T*>(x.out) + b * x.out_b + n * x.out_n + from * x.out_h + channel;
    // All loads before the first store: in place the compiler may not move a load over one.
    Pairs<T, interleaved, P> rows[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h, in += x.in_h)
      if (h < heads) rows[h].load(in, r.pairs);
#pragma unroll
    for (int h = 0; h < kHeads; ++h, out += x.out_h) {
      if (h >= heads) break;
      float a[P], y[P];
#pragma unroll
      for (int i = 0; i < P; ++i) {
        a[i] = rows[h].a(i), y[i] = rows[h].b(i);
        if (turned) turn_pair(a[i], y[i], cos[i], sin[i], a[i], y[i]);
      }
      store<T, interleaved>(out, r.pairs, a, y);
    }
  }
}

template <class T, bool interleaved, int P>
int rotate(const Rotation& r, int groups, void* stream) {
  const unsigned accesses = unsigned(r.pairs) / P, tokens = kThreads / accesses;
  const dim3 grid(unsigned((r.N - r.first + tokens - 1) / tokens), unsigned(groups), unsigned(r.B < kMostClips ? r.B : kMostClips));
  return launch(rope3d_kernel<T, interleaved, P>, grid, dim3(accesses, tokens), stream, r);
}

template <class T>
int run(Rotation r, int tensors, bool interleaved, void* stream) {
  constexpr int pairs = pairs_of<T>(true), halves = pairs_of<T>(false);
  bool whole = r.pairs % (interleaved ? pairs : halves) == 0 && r.pairs % 4 == 0 && aligned(r.table.cos, 4, 0, 0, 0);
  whole = whole && aligned(r.table.sin, 4, r.table.stride_b, r.table.stride_h, 0);
  for (int i = 0; i < tensors; ++i) whole = whole && aligned(r.x[i], sizeof(T));
  r.heads_of_group = r.table.stride_h ? 1 : kHeads;
  int groups = 0;
  for (int i = 0; i < 3; ++i) {
    r.groups[i] = groups;
    groups += i < tensors ? int((r.x[i].heads + r.heads_of_group - 1) / r.heads_of_group) : 0;
  }
  if (r.B == 0 || groups == 0 || r.N <= r.first) return cudaSuccess;
  if (interleaved) return whole ? rotate<T, true, pairs>(r, groups, stream) : rotate<T, true, 1>(r, groups, stream);
  return whole ? rotate<T, false, halves>(r, groups, stream) : rotate<T, false, 1>(r, groups, stream);
}

}  // namespace

int rope3d_cuda(const RopeCall& call, const RopeTensor* x, int tensors, const RopeTable<float>& table, void* stream) {
  Rotation r = {{}, table, call.B, call.N, call.D / 2, call.prefix, 0, {}, 0, call.inverse ? -1.0f : 1.0f};
  bool in_place = true;
  for (int i = 0; i < tensors; ++i) {
    r.x[i] = x[i];
    in_place = in_place && x[i].in == x[i].out;
  }
  r.first = in_place ? call.prefix : 0;
  if (call.dtype == kFloat32) return run<float>(r, tensors, call.interleaved, stream);
  if (call.dtype == kBFloat16) return run<__nv_bfloat16>(r, tensors, call.interleaved, stream);
  if (call.dtype == kFloat16) return run<__half>(r, tensors, call.interleaved, stream);
  return cudaErrorInvalidValue;
}

}  // namespace evaat
