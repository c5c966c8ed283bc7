// What a tile of cosines becomes: losses, slopes and their sums. A header, so that files of few kernels each compile side by side.
#pragma once
#include <cmath>
#include <limits>

#include "common/dtype.h"
#include "pairwise/tile.h"

namespace evaat::sms {

// Where labels come from. kAny reads whatever PairLabels can say, the others the one thing that they say faster. kOne: one label for
// all pairs; kSame: and one own relevancy.
enum Source { kOne, kDense, kTable, kByCode, kByVerb, kAny, kSame };
template <int source>
constexpr bool kIsOne = source == kOne || source == kSame;

struct Panel {
  tile::Matrix video, text;
  int E;
  const Anchor *videos, *captions;
  const char* table;
  int dtype;     // of the table
  int64_t half;  // from labels of another verb to those of the same, in bytes
  const float* values;
  float margin, relaxation, eps, more, less;  // d > more: the first branch; d <= less: costs nothing
  bool near_margin;                           // whether equal labels keep their margin * d
  char* slopes;
  uint32_t stride;  // in bytes
  int32_t *row_sum, *col_sum;
  float *row_loss, *col_loss;
  int first, last, down, across, walk;
};

// What a penalty reads, from what Python says of it.
inline void set_costs(Panel& p, const Penalty& costs) {
  const bool code = costs.rule == kCode;
  p.margin = float(costs.margin), p.relaxation = float(costs.relaxation), p.eps = float(costs.eps), p.near_margin = code;
  p.more = code ? p.eps : std::nextafter(p.eps, -std::numeric_limits<float>::infinity());
  p.less = costs.rule == kCharades ? -p.eps : std::numeric_limits<float>::quiet_NaN();
}

// What belongs to the rows of a tile, in shared memory behind the chunks. On Hopper two blocks fit into an SM where E <= 256 and
// nothing but `Extra` is left out; on Ampere one, from E = 193 on.
struct alignas(16) Constants {
  Anchor videos[kTile];
  float inverse[kTile], cosine[kTile], own[kTile];  // of the captions
  uint32_t place[kTile], verb[kTile];
  float values[256];
  uint32_t columns[4][tile::kThreads][2];  // each thread's sums of slopes of its captions, two in one: exact up to 64 tiles
  float loss[tile::kThreads];                   // each thread's
  double total[tile::kThreads / 32];
  float relaxation;
  uint32_t ones;                 // 1.0, twice
  uint8_t row[tile::kThreads];  // the video whose sum a thread hands on
};
struct Extra : Constants {
  float weight[kTile], losses[4][kTile];
  int64_t far[kTile], wide_verb[kTile];  // places and verbs of any size
};
static_assert(2 * (6 * tile::kChunkBytes + int(sizeof(Constants)) + 1024) <= 228 * 1024);
template <bool any>
using Shape = std::conditional_t<any, Extra, Constants>;

// evaat_fast/ops/pairwise/reference.py, penalty; m: what decides the sign of the slope. Nothing is fused: a pair on a kink falls on
// the side that it has there. `any`: every rule, else "code" alone. A pair costs something where the result is > 0 or NaN.
template <bool any>
__device__ inline float penalty(const Panel& p, float relaxation, float own, float label, float cosine, float s, float& m) {
  const float d = __fsub_rn(own, label), near = __fsub_rn(s, cosine);
  const bool equal = fabsf(d) < p.eps;
  float lift = __fmul_rn(p.margin, d);
  if (any && equal && !p.near_margin) lift = 0.0f;
  m = __fadd_rn(lift, near);
  float cost = d > p.more ? m : -m;
  if (equal) cost = __fsub_rn(fabsf(m), relaxation);
  return any && d <= p.less ? 0.0f : cost;
}

// Of two pairs: 1.0 or -1.0 by the sign of m, as elements of T in 32 bits. ones: kOnes<T>, in a register.
template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
__device__ inline uint32_t signs_of(float first, float second, uint32_t ones) {
  return signs(__byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632), ones);
}

__device__ inline float any_label(int dtype, const float* values, const char* at) {
  switch (dtype) {
    case kFloat32: return *reinterpret_cast<const float*>(at);
    case kFloat64: return float(*reinterpret_cast<const double*>(at));
    case kBFloat16: return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at));
    case kFloat16: return __half2float(*reinterpret_cast<const __half*>(at));
    default: return values[load_byte(at)];
  }
}

// Labels of four captions, c .. c + 3 of the tile, with a video, where they have codes these; the first `inside` count. Beyond the last caption a place is 0.
template <int source>
__device__ inline void labels_of(const Panel& p, const Shape<source == kAny>& of, const Anchor* video, int c, int n, int inside,
                                 float (&label)[4]) {
  if constexpr (kIsOne<source>) {
    const float one = __uint_as_float(load_shared(shared_address(of.values)));
#pragma unroll
    for (int i = 0; i < 4; ++i) label[i] = one;
    return;
  }
  int64_t where[2];  // the table's row, and the verb
  load_shared(where, shared_address(&video->place));
  const char* row = reinterpret_cast<const char*>(where[0]);
  if constexpr (source == kDense) {
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (inside > 0) four = __ldg(reinterpret_cast<const float4*>(row + int64_t(n) * 4));
    label[0] = four.x, label[1] = four.y, label[2] = four.z, label[3] = four.w;
  } else if constexpr (source == kAny) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = of.far[c + i] + (where[1] == of.wide_verb[c + i] ? p.half : 0);
      label[i] = any_label(p.dtype, of.values, row + at);
    }
  } else {
    uint32_t places[4], verb[4] = {};
    load_shared(places, shared_address(of.place + c));
    if constexpr (source == kByVerb) load_shared(verb, shared_address(of.verb + c));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t half = source == kByVerb && uint32_t(where[1]) == verb[i] ? uint32_t(p.half) : 0;
      const char* from = row + uint64_t(places[i]) + uint64_t(half);
      if constexpr (source == kTable)
        label[i] = __ldg(reinterpret_cast<const float*>(from));
      else
        label[i] = __uint_as_float(load_byte(from));
    }
  }
}

// Losses of a thread: kEach, of its captions while it walks; else of a tile.
template <int mode>
struct Sums {
  float loss[mode == kEach ? 16 : 1] = {};
};

// What four neighbouring captions have, from shared memory.
struct Captions {
  float inverse[4], cosine[4], own[4], weight[4];

  template <bool any, int mode>
  __device__ void read(const Shape<any>& of, int c) {
    load_shared(inverse, shared_address(of.inverse + c));
    load_shared(cosine, shared_address(of.cosine + c));
    load_shared(own, shared_address(of.own + c));
    if constexpr (mode == kWeighted) load_shared(weight, shared_address(of.weight + c));
  }
};

// Slopes of four pairs of one video, two in 32 bits.
struct Slopes {
  uint32_t row[2], column[2], both[2];  // of the video's side, of the captions', and what the panel gets
};

// Four products of a video become losses and slopes. idle(k): pair k does not count. apart(): between the first two and the others.
template <class T, int source, bool any, int mode, class Idle, class Apart>
__device__ inline Slopes quad(const Panel& p, const Shape<any>& of, const float (&product)[4], const float (&video)[4], const Captions& to,
                              const float (&read)[4], float* row_loss, float* column_loss, Idle idle, Apart apart) {
  // From shared memory, as the compiler would read them again for each use where it knew that they are constants.
  const float relaxation = __uint_as_float(load_shared(shared_address(&of.relaxation)));
  const uint32_t ones = load_shared(shared_address(&of.ones));
  constexpr int stride = mode == kEach ? 1 : 0;
  Slopes out;
  float label[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    label[i] = read[i];
    if constexpr (source == kByCode || source == kByVerb)
      label[i] = __uint_as_float(load_shared(shared_address(of.values) + 4 * __float_as_uint(label[i])));
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    if (pair) apart();
    float m_row[2], m_col[2], of_row[2], of_col[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int k = 2 * pair + x;
      const float s = __fmul_rn(__fmul_rn(product[k], video[0]), to.inverse[k]);
      of_col[x] = penalty<any>(p, relaxation, to.own[k], label[k], to.cosine[k], s, m_col[x]);
      of_row[x] = penalty<any>(p, relaxation, source == kSame ? to.own[k] : video[2], label[k], video[1], s, m_row[x]);
      if (idle(k)) of_col[x] = of_row[x] = 0.0f;
    }
    uint32_t row = signs_of(m_row[0], m_row[1], ones), col = signs_of(m_col[0], m_col[1], ones);
    count<0xffff0000u>(of_row[0], *row_loss, row), count<0x0000ffffu>(of_row[1], *row_loss, row);
    count<0xffff0000u>(of_col[0], column_loss[stride * 2 * pair], col), count<0x0000ffffu>(of_col[1], column_loss[stride * (2 * pair + 1)], col);
    out.row[pair] = row, out.column[pair] = col;
    if constexpr (mode == kWeighted) {
      auto weighted = [&](int x) {
        return __fadd_rn(__fmul_rn(unpack2<T>(row, x), video[3]), __fmul_rn(unpack2<T>(col, x), to.weight[2 * pair + x]));
      };
      out.both[pair] = pack2<T>(weighted(0), weighted(1));
    } else {
      out.both[pair] = add2<T>(row, col);
    }
  }
  return out;
}

// Where the slopes of a row of the panel lie, of the captions from c on.
__device__ inline char* slopes_at(const Panel& p, int row, int c) {
  return p.slopes + uint32_t(row) * uint64_t(p.stride) + 2 * int64_t(c);
}

// One tile. rows: the sums of the slopes of the videos' side; row_loss: of each video in mode kEach. In kernels of any labels what
// does not count is left out; in the others there is nothing of that kind.
template <class T, int source, bool any, int mode>
__device__ inline void tile_of(const Panel& p, Shape<any>& of, int m0, int n0, tile::Products& acc, Sums<mode>& sums, float (&rows)[2][4],
                               float (&row_loss)[4]) {
  const tile::Lane lane;
  const tile::Lane of_group[2] = {lane, tile::Lane(thread_of_warp())};  // lest an address of one is kept for the other
  constexpr bool learns = mode == kSlopes || mode == kWeighted, each = mode == kEach;
  const int t = thread();
  float labels[2][4];
  uint32_t out[4][4], of_rows[4], columns[2];
  Captions captions;
  // How many of four captions there are, for a video that is there.
  auto inside = [&](int r, int c) { return !any ? 4 : m0 + lane.video_of(r) < p.last ? int(p.text.N) - n0 - c : 0; };
  // Step u: captions c .. c + 3 with one video, whose labels are asked for a step ahead.
  auto fetch = [&](int u) {
    const int c = lane.caption_of(u >> 3, 4 * (u >> 2 & 1)), r = u & 3;
    labels_of<source>(p, of, of.videos + lane.video_of(r), c, n0 + c, inside(r, c), labels[u & 1]);
  };
  // The compiler would mix all steps, and run out of registers and predicates: a branch that is never taken keeps them apart.
  auto apart = [&](int u) {
    if (p.across <= u - 32) __trap();
  };
  auto ahead = [](int u) { return !any && u > (source == kByVerb ? 16 : 1) && u < 16; };  // registers are short at the first step
#pragma unroll
  for (int u = 0; u < 16; ++u) {
    apart(2 * u);
    const int group = u >> 3, h = u >> 2 & 1, r = u & 3, c = lane.caption_of(group, 4 * h), m = m0 + lane.video_of(r);
    if (r == 0) {
      captions.template read<any, mode>(of, c);
      if constexpr (learns) load_shared(columns, shared_address(of.columns[u >> 2][t]));
    }
    float video[4];
    load_shared(video, shared_address(of.videos + lane.video_of(r)));
    if (!ahead(u)) fetch(u);
    if (ahead(u + 1)) fetch(u + 1);
    const int j = 4 * group + 2 * h, i = r >> 1, x = 2 * (r & 1);
    const float products[4] = {acc[i][j][x], acc[i][j][x + 1], acc[i][j + 1][x], acc[i][j + 1][x + 1]};
    const Slopes slopes = quad<T, source, any, mode>(
        p, of, products, video, captions, labels[u & 1], each ? row_loss + r : sums.loss, each ? sums.loss + 8 * group + 4 * h : sums.loss,
        [&](int k) { return any && (k >= inside(r, c) || n0 + c + k == m); },
        [&] { if (u == 0) apart(1); });
    if constexpr (learns) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        columns[pair] = add2<T>(columns[pair], slopes.column[pair]);
        of_rows[(r & 1) + 2 * pair] = slopes.row[pair], out[r][2 * h + pair] = slopes.both[pair];
      }
      // Slopes lie in registers as the left factor of a product: times ones, they are added up by row.
      if (r & 1) mma<T>(rows[i], of_rows, kOnes<T>, kOnes<T>, rows[i]);
      if (r == 3) store_shared(shared_address(of.columns[u >> 2][t]), columns);
      if (h && (!any || (m < p.last && n0 + lane.caption_of(group, 0) < int(p.stride / 2))))
        store_global(slopes_at(p, m0 - p.first + of_group[group].video_of(r), n0 + lane.caption_of(group, 0)), out[r]);
    }
  }
}

// The same of a tile with pairs that do not count, beyond an end or of a video with its own caption, by way of `room` in shared
// memory for 16 products of each thread: such tiles are few, and this takes few instructions and registers.
template <class T, int source>
__device__ inline void edge_of(const Panel& p, Constants& of, int m0, int n0, tile::Products& acc, float& loss, Shared room) {
  const tile::Lane lane;
  const int t = thread();
  const Shared mine = room + 64 * t;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const int c = lane.caption_of(j >> 2, 2 * (j & 3));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = r >> 1, x = 2 * (r & 1);
      const float products[4] = {acc[i][j][x], acc[i][j][x + 1], acc[i][j + 1][x], acc[i][j + 1][x + 1]};
      store_shared(mine + 16 * r, products);
    }
    Captions captions;
    captions.read<false, kSlopes>(of, c);
    uint32_t columns[2];
    load_shared(columns, shared_address(of.columns[j >> 1][t]));
#pragma unroll 1
    for (int r = 0; r < 4; ++r) {
      const int row = lane.video_of(r), m = m0 + row, inside = m < p.last ? int(p.text.N) - n0 - c : 0;
      float products[4], video[4], labels[4];
      load_shared(products, mine + 16 * r);
      load_shared(video, shared_address(of.videos + row));
      labels_of<source>(p, of, of.videos + row, c, n0 + c, inside, labels);
      const Slopes slopes = quad<T, source, false, kSlopes>(
          p, of, products, video, captions, labels, &loss, &loss, [&](int k) { return k >= inside || n0 + c + k == m; }, [] {});
      const uint32_t two = add2<T>(slopes.row[0], slopes.row[1]);
      int sum = int(unpack2<T>(two, 0)) + int(unpack2<T>(two, 1));
      sum += __shfl_xor_sync(0xffffffffu, sum, 1), sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane.q == 0 && m < p.last) atomicAdd(p.row_sum + m, sum);
      columns[0] = add2<T>(columns[0], slopes.column[0]), columns[1] = add2<T>(columns[1], slopes.column[1]);
      if (m < p.last && n0 + c < int(p.stride / 2)) store_global(slopes_at(p, m - p.first, n0 + c), slopes.both);
    }
    store_shared(shared_address(of.columns[j >> 1][t]), columns);
  }
}

// A sum over the lanes that differ in the bits of `from` .. `to`, in an order that does not depend on the lane.
template <int from, int to, class X>
__device__ inline X across_lanes(X x) {
#pragma unroll
  for (int bit = from; bit <= to; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

// Sums over the walk that began at tile `begin` of videos. Losses: one place holds all of the walk, its other tiles' hold zero.
template <class T, bool any, int mode>
__device__ inline void finish(const Panel& p, Shape<any>& of, int n0, int begin, int count, const Sums<mode>& sums) {
  const tile::Lane lane(thread_of_warp());
  const int t = thread(), warp = t >> 5;
  if constexpr (mode == kEach) {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      const float loss = across_lanes<4, 16>(sums.loss[c]);
      if (lane.g == 0) of.losses[warp & 3][lane.caption_of(c / 8, c % 8)] = loss;
    }
    __syncthreads();
    if (t < kTile && n0 + t < p.text.N)
      for (int i = 0; i < count; ++i)
        p.col_loss[(begin + i) * p.text.N + n0 + t] =
            i ? 0.0f : (of.losses[0][t] + of.losses[1][t]) + (of.losses[2][t] + of.losses[3][t]);
    return;
  }
  const double total = across_lanes<1, 16>(double(of.loss[t]));
  if ((t & 31) == 0) of.total[warp] = total;
  if constexpr (mode == kSlopes || mode == kWeighted) {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      const int sum = across_lanes<4, 16>(int(unpack2<T>(of.columns[c / 4][t][c / 2 % 2], c % 2)));
      const int n = n0 + lane.caption_of(c / 8, c % 8);
      if (lane.g == 0 && n < p.text.N) atomicAdd(p.col_sum + n, sum);
    }
  }
  __syncthreads();
  if (t < count) {
    double all = 0;
    for (int i = 0; i < tile::kThreads / 32 && t == 0; ++i) all += of.total[i];
    p.row_loss[(begin + t) * p.across + int(blockIdx.x)] = float(all);
  }
}

template <class T, int source, bool any, int mode>
__global__ void __launch_bounds__(tile::kThreads, any ? 1 : 2) sms_kernel(const Panel p) {
  char* pool = dynamic_shared();
  Shape<any>& of = *reinterpret_cast<Shape<any>*>(pool + (tile::caption_chunks(p.E) + 2) * tile::kChunkBytes);
  const int t = int(threadIdx.x), begin = int(blockIdx.y) * p.walk, count = min(p.walk, p.down - begin);
  const int n0 = int(blockIdx.x) * kTile, first = p.first + begin * kTile;
  if (t < kTile) {
    Anchor caption = {};
    if (n0 + t < p.text.N) caption = p.captions[n0 + t];
    of.inverse[t] = caption.inverse, of.cosine[t] = caption.cosine, of.own[t] = caption.own;
    of.place[t] = uint32_t(caption.place), of.verb[t] = uint32_t(caption.verb);
    if constexpr (any) of.weight[t] = caption.weight, of.far[t] = caption.place, of.wide_verb[t] = caption.verb;
  }
  const tile::Lane lane;
  of.row[t] = uint8_t(lane.video_of(lane.q)), of.loss[t] = 0.0f;
  const uint32_t none[2] = {};
  for (int i = 0; i < 4; ++i) store_shared(shared_address(of.columns[i][t]), none);
  if (t == 0) of.relaxation = p.relaxation, of.ones = kOnes<T>;
  if (p.values && t < 256) of.values[t] = p.values[t];
  if (kIsOne<source> && t == 0) of.values[0] = p.table ? any_label(p.dtype, p.values, p.table) : 0.0f;
  Sums<mode> walked;
  const tile::Matrix videos = {p.video.rows, p.video.stride, p.last};
  tile::walk<T>(
      videos, p.text, p.E, first, n0, count, shared_address(pool),
      [&](int i) {  // half an anchor a thread
        const int t = thread(), m = min(first + i * kTile + t / 2, p.last - 1);
        copy_async(shared_address(of.videos) + 16 * t, reinterpret_cast<const char*>(p.videos + m) + 16 * (t & 1), true);
      },
      [&](int i, tile::Products& acc, Shared room) {
        const int m0 = first + i * kTile;
        float rows[2][4] = {}, row_loss[4] = {};
        Sums<mode> of_tile;
        Sums<mode>& sums = mode == kEach ? walked : of_tile;
        const bool whole = m0 + kTile <= p.last && n0 + kTile <= p.text.N && (m0 + kTile <= n0 || n0 + kTile <= m0);
        if constexpr (!any) {
          if (!whole) {
            __syncthreads();  // the chunk that lay there has been read
            edge_of<T, source>(p, of, m0, n0, acc, sums.loss[0], room);
            of.loss[thread()] += sums.loss[0];
            return;
          }
        }
        tile_of<T, source, any, mode>(p, of, m0, n0, acc, sums, rows, row_loss);
        if constexpr (mode != kEach) of.loss[thread()] += sums.loss[0];
        if constexpr (mode == kSlopes || mode == kWeighted) {
          // All four lanes of a row have its sum; each adds that of another row.
          const int row = int(load_shared_byte(shared_address(of.row + thread()))), which = row >> 3 & 3;
          const float low = which & 1 ? rows[0][2] : rows[0][0], high = which & 1 ? rows[1][2] : rows[1][0];
          if (m0 + row < p.last) atomicAdd(p.row_sum + m0 + row, int(which & 2 ? high : low));
        }
        if constexpr (mode == kEach) {
          const tile::Lane lane;
          const int t = thread();
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float loss = across_lanes<1, 2>(row_loss[r]);
            if (lane.q == 0) of.losses[lane.warp_n / 64][lane.video_of(r)] = loss;
          }
          __syncthreads();
          const int m = m0 + t;
          if (t < kTile && m < p.last) p.row_loss[int64_t(blockIdx.x) * (p.last - p.first) + (m - p.first)] = of.losses[0][t] + of.losses[1][t];
          __syncthreads();
        }
      });
  finish<T, any, mode>(p, of, n0, begin, count, walked);
}

template <class T, int source, bool any, int mode>
int run(const Panel& p, void* stream) {
  const int bytes = (tile::caption_chunks(p.E) + 2) * tile::kChunkBytes + int(sizeof(Shape<any>));
  const dim3 grid(unsigned(p.across), unsigned((p.down + p.walk - 1) / p.walk));
  return launch_with(bytes, sms_kernel<T, source, any, mode>, grid, dim3(tile::kThreads), stream, p);
}

// All kernels of panels of T.
template <class T>
int panel(const Panel& p, int source, int mode, void* stream) {
  if (source == kOne) return run<T, kOne, false, kSlopes>(p, stream);
  if (source == kSame) return run<T, kSame, false, kSlopes>(p, stream);
  if (source == kDense) return run<T, kDense, false, kSlopes>(p, stream);
  if (source == kTable) return run<T, kTable, false, kSlopes>(p, stream);
  if (source == kByCode) return run<T, kByCode, false, kSlopes>(p, stream);
  if (source == kByVerb) return run<T, kByVerb, false, kSlopes>(p, stream);
  if (mode == kLoss) return run<T, kAny, true, kLoss>(p, stream);
  if (mode == kSlopes) return run<T, kAny, true, kSlopes>(p, stream);
  if (mode == kEach) return run<T, kAny, true, kEach>(p, stream);
  return run<T, kAny, true, kWeighted>(p, stream);
}
int panel_bf16(const Panel& p, int source, int mode, void* stream);
int panel_fp16(const Panel& p, int source, int mode, void* stream);

int size_of(int dtype);  // bytes of a label
tile::Matrix matrix(const void* rows, int64_t stride, int64_t N);  // of 16-bit features, stride in elements
int source_of(const SmsGpu& step);

}  // namespace evaat::sms
