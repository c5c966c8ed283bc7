// Which kernel serves a panel of a max-margin loss.
#include <limits>

#include "pairwise/sms.h"

namespace evaat {
namespace sms {

int size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : dtype == kCodes ? 1 : 2; }

tile::Matrix matrix(const void* rows, int64_t stride, int64_t N) { return {static_cast<const char*>(rows), 2 * stride, N}; }

// What trains has kernels of its own: slopes by rule "code", from labels that stand in a matrix, are one number for all, or are chosen
// by indices.
int source_of(const SmsGpu& step) {
  const PairLabels& of = step.labels;
  const int64_t size = size_of(of.dtype), far = ((step.C - 1) * of.strides[2] + of.strides[0]) * size;
  const bool near = far < int64_t(std::numeric_limits<uint32_t>::max());
  if (step.mode != kSlopes || step.penalty.rule != kCode) return kAny;
  if (!of.video_index && of.strides[1] == 0 && of.strides[2] == 0) return step.own_of_all ? kSame : kOne;
  if (of.dtype == kFloat32 && !of.video_index && of.strides[2] == 1 && of.strides[1] % 4 == 0 && step.pairs.N % 4 == 0 &&
      reinterpret_cast<uintptr_t>(of.table) % 16 == 0)
    return kDense;
  if (of.dtype == kFloat32 && !of.verb && near) return kTable;
  if (of.dtype == kCodes && near) return of.verb ? kByVerb : kByCode;
  return kAny;
}

}  // namespace sms

int sms_panel_cuda(const SmsGpu& step, const SmsOut& out, void* stream) {
  const PairFeatures& f = step.pairs;
  const PairLabels& labels = step.labels;
  const int size = sms::size_of(labels.dtype);
  sms::Panel p = {sms::matrix(f.video, f.video_stride, f.N), sms::matrix(f.text, f.text_stride, f.N), int(f.E)};
  p.videos = step.videos, p.captions = step.captions;
  p.table = static_cast<const char*>(labels.table), p.dtype = labels.dtype, p.half = labels.strides[0] * size;
  p.values = static_cast<const float*>(labels.values);
  sms::set_costs(p, step.penalty);
  p.slopes = static_cast<char*>(out.slopes), p.stride = uint32_t(2 * out.stride);
  p.row_sum = step.row_sum, p.col_sum = step.col_sum, p.row_loss = out.row_loss, p.col_loss = out.col_loss;
  p.first = int(out.first), p.last = int(out.last);
  p.down = (p.last - p.first + kTile - 1) / kTile, p.across = int((f.N + kTile - 1) / kTile);
  // So many tiles of videos for each block that all blocks run at once, two an SM as on Hopper; sums of slopes are exact up to 64.
  const int at_once = 2 * multiprocessors();
  p.walk = std::min(std::min(32, p.down), std::max(1, (p.down * p.across + at_once - 1) / at_once));
  const int source = sms::source_of(step);
  if (f.dtype == kBFloat16) return sms::panel_bf16(p, source, step.mode, stream);
  if (f.dtype == kFloat16) return sms::panel_fp16(p, source, step.mode, stream);
  return cudaErrorInvalidValue;
}

}  // namespace evaat
