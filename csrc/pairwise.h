// What the pairwise losses do with a panel of the N x N similarities, between the matrix products that torch makes.
//
// A panel is rows first .. first + rows - 1 (videos) times all N columns (captions), contiguous. float stands for the type of the
// computation below: float32 features (and narrower ones) are computed in float, float64 in double; `wide` is its Dtype code.
#pragma once
#include <cstdint>

namespace evaat {

constexpr int kCodes = 4;  // beside the Dtypes: uint8 codes, read through a table of 256 values

// relevancy[j, i] = table[verb && verb[j] == verb[i], video_index ? video_index[j] : j, caption_index ? caption_index[i] : i],
// strides in elements; verb comes with indices.
struct PairLabels {
  const void* table;
  int dtype;
  int64_t stride_half, stride_row, stride_col;
  const int64_t *video_index, *caption_index, *verb;
  const void* values;  // float [256], for codes only
};

// N rows of E features of any Dtype, the last dimension contiguous.
struct PairFeatures {
  const void* data;
  int64_t stride;
};

// norm_* [N] and diagonal [N]: |v|, |t| and cos(v, t) of each pair. unit_*: the rows divided by max(norm, 1e-8), in the type of
// the computation, or in bfloat16 where unit_bf16; null to leave them out.
int sms_prepare(int dtype, int wide, PairFeatures video, PairFeatures text, int64_t N, int64_t E, void* norm_video, void* norm_text,
                void* diagonal, void* unit_video, void* unit_text, bool unit_bf16, int threads);

enum Rule { kCode, kPaper, kCharades };  // which penalty a difference of labels gets: evaat_fast/ops/pairwise.py

struct SmsPanel {
  int wide, dtype;  // dtype of s: `wide`, or bfloat16 for products of raw rows, which row_scale and col_scale turn into cosines
  void* s;          // in: similarities; out, if write: the slopes g1 + g2 in {-2 .. 2}, with 0 on the diagonal
  int64_t rows, N, first;
  const void *row_scale, *col_scale;  // float [N] or null
  const void *diagonal, *self;        // float [N]: cosine and relevancy of each pair itself
  PairLabels labels;
  double margin, relaxation, eps;
  int rule;
  bool write;
  double* row_loss;   // [N]: sum of both penalties over each row's pairs
  int32_t* row_sum;   // [N]: sum of g2 (anchored at the row's video)
  int32_t* col_sum;   // [threads, N], accumulated: sums of g1 (anchored at the column's caption)
};
int sms_panel(const SmsPanel& panel, int threads);

// In place: gradient[i] = factor * (gradient[i] + slope[i] * unit(other[i])), taken through the normalisation of x; zero where
// norm_x < 1e-8.
int sms_finish(int dtype, int wide, PairFeatures x, const void* norm_x, PairFeatures other, const void* norm_other,
               const int32_t* slope, void* gradient, double factor, int64_t N, int64_t E, int threads);

// Both sweeps of the symmetric cross-entropy. The logits are scale * s.
struct ClipPanel {
  int wide;
  void* s;
  int64_t rows, N, first;
  double scale;
  double *row_max, *row_sum, *col_max, *col_sum;  // [N]: the largest logit, and the sum of exp(logit - largest)
  double* target;                                 // [N]: each pair's own logit
  double* row_slope;                              // [N]: sum of slope * s over the row, second sweep
};
// First sweep: fills row_* of the panel's rows and target, and carries col_* (which begin as -inf and 0) one panel on.
int clip_stats(const ClipPanel& panel, int threads);
// Second sweep: s becomes exp(logit) / row sum + exp(logit) / column sum - 2 [own pair].
int clip_slopes(const ClipPanel& panel, int threads);

}  // namespace evaat
