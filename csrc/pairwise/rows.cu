// What is done to rows of features before and after the panels, a warp a row; and the pairs' own cosines, from the tiles that the
// panels are made of, scaled in the same order: of a pair that stands in the batch twice, x_ij is x_ii to the last bit.
#include "common/dtype.h"
#include "pairwise/sms.h"

namespace evaat {
namespace {

constexpr int kThreads = 256, kRows = kThreads / 32;

__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline float floored(float norm) { return norm < 1e-8f ? 1e-8f : norm; }  // NaN passes

// grid: rows, and videos or captions.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const PairFeatures f, void* unit_video, void* unit_text) {
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x / 32;
  const int lane = thread_of_warp(), is_text = int(blockIdx.y);
  if (i >= f.N) return;
  const T* x = static_cast<const T*>(is_text ? f.text : f.video) + i * (is_text ? f.text_stride : f.video_stride);
  T* unit = static_cast<T*>(is_text ? unit_text : unit_video) + i * f.E;
  float sum = 0.0f;
  for (int64_t e = lane; e < f.E; e += 32) sum += widen(x[e]) * widen(x[e]);
  const float norm = __fsqrt_rn(sms::across_lanes<1, 16>(sum)), divisor = floored(norm);
  for (int64_t e = lane; e < f.E; e += 32) narrow(unit[e], __fdiv_rn(widen(x[e]), divisor));
  float* norms = static_cast<float*>(f.norms) + is_text * f.N + i;
  if (lane == 0) norms[0] = norm, norms[2 * f.N] = __fdiv_rn(1.0f, divisor);
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const PairFeatures f, const int32_t* row_sum, const int32_t* col_sum,
                                                          const float* weight, float* grad_video, float* grad_text, float factor) {
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x / 32;
  const int lane = thread_of_warp(), is_text = int(blockIdx.y);
  float* grad = is_text ? grad_text : grad_video;
  if (i >= f.N || !grad) return;
  grad += i * f.E;
  const T *video = static_cast<const T*>(f.video) + i * f.video_stride, *text = static_cast<const T*>(f.text) + i * f.text_stride;
  const T *own = is_text ? text : video, *other = is_text ? video : text;
  const float* norms = static_cast<const float*>(f.norms) + i;
  const float norm = norms[is_text * f.N], divisor = floored(norm), other_divisor = floored(norms[(1 - is_text) * f.N]);
  float slope = -float(row_sum[i] + col_sum[i]), dot = 0.0f;
  if (weight) slope *= weight[i];
  auto of_unit = [&](int64_t e) { return (grad[e] + slope * __fdiv_rn(widen(other[e]), other_divisor)) * factor; };
#pragma unroll 1
  for (int64_t e = lane; e < f.E; e += 32) dot += of_unit(e) * __fdiv_rn(widen(own[e]), divisor);
  dot = sms::across_lanes<1, 16>(dot);
#pragma unroll 1
  for (int64_t e = lane; e < f.E; e += 32) {
    const float through = __fdiv_rn(of_unit(e) - __fdiv_rn(widen(own[e]), divisor) * dot, norm);
    grad[e] = norm < 1e-8f ? 0.0f : through;
  }
}

struct Pairs {
  SmsGpu step;
  tile::Matrix video, text;
  int source;
  int64_t row, column;  // strides of the table in bytes
};

// One side of pair i; the table has `size` entries of that side, `stride` bytes apart.
__device__ inline Anchor anchor(const Pairs& p, int64_t i, float inverse, float cosine, const int64_t* index, int64_t size, int64_t stride) {
  const SmsGpu& s = p.step;
  Anchor out = {inverse, cosine, s.own[i], s.weight ? s.weight[i] : 0.0f, 0, s.labels.verb ? s.labels.verb[i] : 0};
  const int64_t place = index ? index[i] : i;
  const bool known = place >= 0 && place < size && (p.source != sms::kByVerb || out.verb == int64_t(int32_t(out.verb)));
  out.place = known ? place * stride : 0;
  if (!known) out.inverse = __uint_as_float(0x7fc00000u);  // all its pairs are NaN, and so is the loss
  return out;
}

template <class T>
__global__ void __launch_bounds__(tile::kThreads) anchors_kernel(const Pairs p) {
  __shared__ float own[kTile];
  const int first = int(blockIdx.x) * kTile, t = int(threadIdx.x);
  tile::walk<T>(
      p.video, p.text, int(p.step.pairs.E), first, first, 1, shared_address(dynamic_shared()), [](int) {},
      [&](int, tile::Products& acc, Shared) {
        const tile::Lane lane;
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 16; ++c)
            if (lane.video_of(r) == lane.caption_of(c / 8, c % 8)) own[lane.video_of(r)] = acc[r >> 1][c / 2][2 * (r & 1) + c % 2];
      });
  __syncthreads();
  const int64_t i = first + t, N = p.step.pairs.N;
  if (t >= kTile || i >= N) return;
  const PairLabels& labels = p.step.labels;
  const float *inverses = static_cast<const float*>(p.step.pairs.norms) + 2 * N, video = inverses[i], text = inverses[N + i];
  const float cosine = __fmul_rn(__fmul_rn(own[t], video), text);
  Anchor of_video = anchor(p, i, video, cosine, labels.video_index, p.step.V, p.row);
  of_video.place += reinterpret_cast<int64_t>(labels.table);
  p.step.videos[i] = of_video;
  p.step.captions[i] = anchor(p, i, text, cosine, labels.caption_index, p.step.C, p.column);
}

template <class T>
int anchors(const Pairs& p, void* stream) {
  const int bytes = (tile::caption_chunks(int(p.step.pairs.E)) + 2) * tile::kChunkBytes;
  const dim3 grid(unsigned((p.step.pairs.N + kTile - 1) / kTile));
  return launch_with(bytes, anchors_kernel<T>, grid, dim3(tile::kThreads), stream, p);
}

dim3 rows_of(const PairFeatures& f) { return {unsigned((f.N + kRows - 1) / kRows), 2}; }

}  // namespace

int pair_prepare_cuda(const PairFeatures& f, void* unit_video, void* unit_text, void* stream) {
  if (f.dtype == kBFloat16) return launch(prepare_kernel<__nv_bfloat16>, rows_of(f), dim3(kThreads), stream, f, unit_video, unit_text);
  if (f.dtype == kFloat16) return launch(prepare_kernel<__half>, rows_of(f), dim3(kThreads), stream, f, unit_video, unit_text);
  return cudaErrorInvalidValue;
}

int pair_finish_cuda(const PairFeatures& f, const int32_t* row_sum, const int32_t* col_sum, const float* weight, float* grad_video,
                     float* grad_text, float factor, void* stream) {
  const dim3 grid = rows_of(f), block(kThreads);
  if (f.dtype == kBFloat16)
    return launch(finish_kernel<__nv_bfloat16>, grid, block, stream, f, row_sum, col_sum, weight, grad_video, grad_text, factor);
  if (f.dtype == kFloat16) return launch(finish_kernel<__half>, grid, block, stream, f, row_sum, col_sum, weight, grad_video, grad_text, factor);
  return cudaErrorInvalidValue;
}

int sms_anchors_cuda(const SmsGpu& step, void* stream) {
  const PairFeatures& f = step.pairs;
  const auto& strides = step.labels.strides;
  const int64_t size = sms::size_of(step.labels.dtype);
  const Pairs p = {step, sms::matrix(f.video, f.video_stride, f.N), sms::matrix(f.text, f.text_stride, f.N), sms::source_of(step),
                   strides[1] * size, strides[2] * size};
  if (f.dtype == kBFloat16) return anchors<__nv_bfloat16>(p, stream);
  if (f.dtype == kFloat16) return anchors<__half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace evaat
