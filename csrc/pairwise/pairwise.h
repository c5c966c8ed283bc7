// What the pairwise losses do with a panel of the N x N similarities, between the matrix products that torch makes.
//
// float stands for the type of the computation below: float32 features (and narrower ones) are computed in float, float64 in
// double; `wide` is its Dtype code. Every function returns a Status.
#pragma once
#include <array>
#include <cstdint>

namespace evaat {

constexpr int kCodes = 4;  // beside the Dtypes: uint8 codes, read through a table of 256 values

// relevancy[j, i] = table[verb && verb[j] == verb[i], video_index ? video_index[j] : j, caption_index ? caption_index[i] : i],
// strides in elements; verb comes with indices.
struct PairLabels {
  const void* table;
  int dtype;
  std::array<int64_t, 3> strides;
  const int64_t *video_index, *caption_index, *verb;
  const void* values;  // float [256], for codes only
};

// N pairs of rows of E features of any Dtype, the last dimension contiguous; norms: float [3, N], |v|, |t| and cos(v, t).
struct PairFeatures {
  int dtype, wide;
  int64_t N, E;
  const void *video, *text;
  int64_t video_stride, text_stride;
  void* norms;
};

// Fills the norms. unit_*: the rows divided by max(norm, 1e-8), in the type of the computation, or in bfloat16 where
// unit_bf16; null to leave them out.
int pair_prepare(const PairFeatures& pairs, void* unit_video, void* unit_text, bool unit_bf16, int threads);

// Of the videos, or of the captions. slope: float [N]. In place: gradient[i] = factor * (gradient[i] + slope[i] * unit(other[i])),
// taken through the normalisation; zero where the norm is < 1e-8.
int pair_finish(const PairFeatures& pairs, bool of_text, const void* slope, void* gradient, double factor, int threads);

// Rows first .. first + rows - 1 (videos) of the similarities times all N columns (captions), contiguous.
struct Panel {
  void* s;
  int64_t first, rows;
};

enum SmsRule { kCode, kPaper, kCharades };  // which penalty a difference of labels gets: evaat_fast/ops/pairwise/reference.py

struct Penalty {
  double margin, relaxation, eps;
  int rule;

  template <class Fields>
  static void list(Fields& to) {  // for bind.h
    to.with("margin", &Penalty::margin).with("relaxation", &Penalty::relaxation).with("eps", &Penalty::eps).with("rule", &Penalty::rule);
  }
};

// What a panel is read for: the sum of all penalties; that, and its slopes; the penalties of each row and column; the slopes of a
// weighted sum of those.
enum SmsMode { kLoss, kSlopes, kEach, kWeighted };

// What all panels of a step share.
struct SmsStep {
  PairFeatures pairs;  // their N, `wide` and norms alone
  int dtype;           // of s: `wide`, or bfloat16 for products of raw rows
  const void* scales;  // float [2, N], what turns products of raw rows into cosines, or null
  const void* own;     // float [N], the relevancy of each pair itself
  PairLabels labels;
  Penalty penalty;
  int mode;
  const void* weight;  // float [N], kWeighted only, where dtype is `wide`
  // Of pairs anchored at each row's video, and, a row for each thread and accumulated, at each column's caption.
  double* losses;      // [1 + threads, N], sums of the penalties; [1, N], of both, but for kEach
  int32_t* sums;       // [1 + threads, N], of the slopes
};

// s, similarities, becomes, with 0 on the diagonal, kSlopes: g1 + g2 in {-2 .. 2}; kWeighted: weight_i g1 + weight_j g2.
int sms_panel(const SmsStep& step, Panel panel, int threads);

constexpr int64_t kMaskBlock = 32;

// Which pairs are positive beside each pair itself: those of dense [N, N] (strides in elements), or, where it is null, those of
// whom verbs and nouns both share a bit; these are [words, N].
struct PairPositives {
  const uint8_t* dense;
  std::array<int64_t, 2> strides;
  const int32_t *verbs, *nouns;
  int64_t verb_words, noun_words;
  uint8_t* mask;  // scratch [rows of a panel, N rounded up to kMaskBlock]; null: every pair is its only positive
};

// [N] each: the largest logit, and the sum of exp(logit - largest).
struct LogSumExp {
  double *largest, *sum;
};

// What all panels of both sweeps of InfoNCE and EgoNCE share. The logits are scale * s.
struct ContrastStep {
  int wide;
  int64_t N;
  double scale;
  PairPositives positives;
  const double* weight;  // [N], what each pair's own loss counts, or null for 1
  double* totals;        // [4, 2, N]: the LogSumExp of each row, column, row's positives and column's positives
  double* row_slope;     // [N]: sum of slope * s over the row, second sweep

  LogSumExp row() const { return total(0); }
  LogSumExp column() const { return total(1); }
  LogSumExp positive_row() const { return total(2); }
  LogSumExp positive_column() const { return total(3); }
  LogSumExp total(int i) const { return {totals + 2 * i * N, totals + (2 * i + 1) * N}; }
};
// First sweep: fills the totals of the panel's rows, and carries the columns' (which begin as -inf and 0) one panel on.
int contrast_stats(const ContrastStep& step, Panel panel, int threads);
// Second sweep: s becomes its slopes, weight_row * (exp(logit - row) - [positive] exp(logit - positive_row)) + the column's.
int contrast_slopes(const ContrastStep& step, Panel panel, int threads);

}  // namespace evaat
