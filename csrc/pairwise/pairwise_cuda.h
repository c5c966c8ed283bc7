// The max-margin losses on a GPU, as tests and bindings see them: every function returns a cudaError_t.
#pragma once
#include "pairwise/pairwise.h"

namespace evaat {

constexpr int kTile = 128;  // videos, and captions, of a tile

// What a pair is to the kernel of the panels, as a video or as a caption: 1 / norm, or NaN where its index lies outside of the
// table; its own cosine and relevancy; what its own loss counts; where its labels lie in the table, in bytes (for a video an address); its verb.
struct Anchor {
  float inverse, cosine, own, weight;
  int64_t place, verb;
};

// What all panels of a step share. Features are bfloat16 or float16, rows at multiples of 16 bytes.
struct SmsGpu {
  PairFeatures pairs;  // norms: float [2, 2, N], |v|, |t|, and the inverses of both
  PairLabels labels;   // values: float [256]
  int64_t V, C;        // the table's rows and columns
  const float *own, *weight;       // [N]; weight or null
  bool own_of_all;                 // own is one number, N times
  Anchor *videos, *captions;       // [N]
  Penalty penalty;
  int mode;
  int32_t *row_sum, *col_sum;      // [N], sums of the slopes of the video's and of the caption's side
};

// Of videos first .. last - 1 and all captions. slopes: [last - first, stride], of the features' dtype, stride a multiple of 8.
// row_loss: float [tiles]; in mode kEach [across, last - first], and col_loss [down, N].
struct SmsOut {
  void* slopes;
  int64_t stride;
  float *row_loss, *col_loss;
  int64_t first, last;
};

// Norms, inverses, and the unit rows in the features' dtype, contiguous; then own cosines and anchors; then panels.
int pair_prepare_cuda(const PairFeatures& pairs, void* unit_video, void* unit_text, void* stream);
int sms_anchors_cuda(const SmsGpu& step, void* stream);
int sms_panel_cuda(const SmsGpu& step, const SmsOut& out, void* stream);
// In place, float [N, E], either may be null: factor * (gradients of the unit rows - (row_sum + col_sum) * weight * the pair's
// other one), through the normalisation.
int pair_finish_cuda(const PairFeatures& pairs, const int32_t* row_sum, const int32_t* col_sum, const float* weight, float* grad_video,
                     float* grad_text, float factor, void* stream);

}  // namespace evaat
