// The plan of freqs_cpu.cpp: a block turns the gradients of kRopeChunk tokens, every head of one frequency at a time, and
// leaves one partial sum. Threads of a row of the block hold the same pairs and take every rows-th token; their sums meet in shared
// memory, in the order of the rows.
#include "rope3d/rope3d_cuda.h"

namespace evaat {
namespace {

using namespace rope;

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65535;

struct Backward {
  RopeTensor grad[2];
  RopeSaved x[2];
  RopeTable<double> table;
  RopePositions positions;
  double* partial;
  int64_t B, N, pairs, prefix, chunks;
  int tensors;
  double sign;  // of every sine
};

template <class T, bool interleaved, int P>
__device__ void turn(const Backward& r, int i, int64_t b, int64_t n, int64_t first, int64_t last, int c, const float (&cos)[P],
                     const float (&sin)[P], double (&dot)[P], double (&cross)[P]) {
  const RopeTensor& g = r.grad[i];
  const T* in = static_cast<const T*>(g.in) + b * g.in_b + n * g.in_n;
  const T* x = static_cast<const T*>(r.x[i].x) + b * r.x[i].x_b + n * r.x[i].x_n;
  T* out = static_cast<T*>(g.out) + b * g.out_b + n * g.out_n;
#pragma unroll 1
  for (int64_t h = first; h < last; ++h) {
    Pairs<T, interleaved, P> gradient, saved;
    gradient.load(in + h * g.in_h, r.pairs, c), saved.load(x + h * r.x[i].x_h, r.pairs, c);
    float a[P], y[P];
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const float ga = gradient.a(k), gb = gradient.b(k), xa = saved.a(k), xb = saved.b(k);
      a[k] = ga, y[k] = gb;
      if (n >= r.prefix) turn_pair(ga, gb, cos[k], sin[k], a[k], y[k]);
      // Over 14 heads, sums in float were 1.4 times as far off as torch's.
      dot[k] += double(xa * ga + xb * gb);
      cross[k] += double(xa * gb - xb * ga);
    }
    store<T, interleaved>(out + h * g.out_h, r.pairs, c, a, y);
  }
}

// grid: chunks of tokens of every clip; heads where each has frequencies of its own, else one.
template <class T, bool interleaved, int P>
__global__ void __launch_bounds__(kThreads, 2) rope3d_freqs_kernel(const Backward r) {
  __shared__ double sums[3 * P * kThreads];
  const int accesses = int(r.pairs) / P, rows = kThreads / accesses, column = threadIdx.x % accesses, row = threadIdx.x / accesses;
  const int c = column * P;
  const bool per_head = r.table.stride_h != 0;
  for (int64_t item = blockIdx.x; item < r.B * r.chunks; item += gridDim.x) {
    const int64_t b = item / r.chunks, chunk = item % r.chunks;
    // The prefix goes with the first chunk.
    const int64_t from = chunk == 0 ? 0 : r.prefix + chunk * kRopeChunk, to = min(r.N, r.prefix + (chunk + 1) * kRopeChunk);
    double sum[3][P] = {};
    for (int64_t n = from + row; n < to && row < rows; n += rows) {
      const bool fixed = n < r.prefix;
      double cosine[P] = {}, sine[P] = {}, dot[P] = {}, cross[P] = {};
      float cos[P], sin[P];
      if (!fixed) {
        const int64_t at = b * r.table.stride_b + blockIdx.y * r.table.stride_h + (n - r.prefix) * r.pairs + c;
        load_table(r.table.cos + at, cosine), load_table(r.table.sin + at, sine);
      }
#pragma unroll
      for (int k = 0; k < P; ++k) sine[k] *= r.sign, cos[k] = float(cosine[k]), sin[k] = float(sine[k]);
      for (int i = 0; i < r.tensors; ++i)
        turn<T, interleaved, P>(r, i, b, n, per_head ? blockIdx.y : 0, per_head ? blockIdx.y + 1 : r.grad[i].heads, c, cos, sin, dot, cross);
      if (fixed) continue;
      const float* position = r.positions.rows + b * r.positions.stride_b + (n - r.prefix) * 3;
#pragma unroll
      for (int k = 0; k < P; ++k) {
        const double slope = cosine[k] * cross[k] + sine[k] * dot[k];
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) sum[axis][k] += double(position[axis]) * slope;
      }
    }
    __syncthreads();  // the sums of the item before have been read
#pragma unroll
    for (int axis = 0; axis < 3; ++axis)
#pragma unroll
      for (int k = 0; k < P; ++k) sums[(axis * P + k) * kThreads + threadIdx.x] = sum[axis][k];
    __syncthreads();
    double* to_partial = r.partial + (item * gridDim.y + blockIdx.y) * 3 * r.pairs;
    for (int i = threadIdx.x; i < 3 * int(r.pairs); i += kThreads) {
      const int axis = i / int(r.pairs), pair = i % int(r.pairs);
      const double* column_sums = sums + (axis * P + pair % P) * kThreads + pair / P;
      double total = 0;
      for (int k = 0; k < rows; ++k) total += column_sums[k * accesses];
      to_partial[i] = total;
    }
  }
}

template <class T, bool interleaved, int P>
int turn(const Backward& r, void* stream) {
  const int64_t items = r.B * r.chunks;
  const dim3 grid(unsigned(items < kMostBlocks ? items : kMostBlocks), unsigned(r.table.stride_h ? r.grad[0].heads : 1));
  return launch(rope3d_freqs_kernel<T, interleaved, P>, grid, dim3(kThreads), stream, r);
}

template <class T>
int run(const Backward& r, bool interleaved, void* stream) {
  constexpr int pairs = pairs_of<T>(true), halves = pairs_of<T>(false) < 4 ? pairs_of<T>(false) : 4;
  bool whole = r.pairs % 4 == 0 && aligned(r.table.cos, 8, 0, 0, 0) && aligned(r.table.sin, 8, r.table.stride_b, r.table.stride_h, 0);
  for (int i = 0; i < r.tensors; ++i)
    whole = whole && aligned(r.grad[i], sizeof(T)) && aligned(r.x[i].x, sizeof(T), r.x[i].x_b, r.x[i].x_h, r.x[i].x_n);
  if (interleaved) return whole ? turn<T, true, pairs>(r, stream) : turn<T, true, 1>(r, stream);
  return whole ? turn<T, false, halves>(r, stream) : turn<T, false, 1>(r, stream);
}

}  // namespace

int rope3d_freqs_cuda(const RopeCall& call, const RopeGradient* x, int tensors, const RopeTable<double>& table,
                      const RopePositions& positions, double* partial, void* stream) {
  const int64_t chunks = (call.N - call.prefix + kRopeChunk - 1) / kRopeChunk, last = tensors - 1;
  const Backward r = {{x[0].grad, x[last].grad}, {x[0].saved, x[last].saved}, table, positions, partial, call.B, call.N,
                      call.D / 2, call.prefix, chunks, tensors, call.inverse ? -1.0 : 1.0};
  if (call.B * chunks == 0) return cudaSuccess;
  if (call.dtype == kFloat32) return run<float>(r, call.interleaved, stream);
  if (call.dtype == kBFloat16) return run<__nv_bfloat16>(r, call.interleaved, stream);
  if (call.dtype == kFloat16) return run<__half>(r, call.interleaved, stream);
  return cudaErrorInvalidValue;
}

}  // namespace evaat
