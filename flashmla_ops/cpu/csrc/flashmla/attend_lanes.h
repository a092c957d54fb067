// Attention for many query rows over the same keys (MLA: all heads of a token): a lane is a query row.
//
// For each block of tokens: S^T = K Q^T with the queries packed once per item; online softmax with nothing horizontal;
// O = O * rescale + P V. Every row of the cache is read once for all query rows. fp32 rows, and bf16 rows where the
// processor multiplies pairs of bf16, are read where they lie: measured with AVX512_BF16 at 16 heads, a sixth less time
// than with a copy of each block. Rows of other types are staged (converted) first, as are the few tokens of a tile
// that crosses pages.
#pragma once

#include <algorithm>

#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/stage.h"

namespace flashmla::FLASHMLA_ISA {

// Q is the type of queries, Row the format of the cache's rows.
template <class Isa, class Q, class Row>
class LaneAttention {
  using T = typename Row::Element;
  using M = Mac<Isa, T>;
  using S = Stage<Isa, T>;
  using Unit = typename M::Unit;
  using F = typename Isa::F;
  static constexpr int W = Isa::W, kPanel = Isa::qk_n * W, kBlock = Isa::block;
  static constexpr int kTokensPerUnit = M::pairs ? 2 : 1;  // of a value
  // Whether a unit has the bytes that lie in the cache, so that rows are read in place.
  static constexpr bool kInPlace = M::pairs || std::is_same_v<T, float>;
  // A panel of one vector takes twice the tokens: qk_m accumulators alone would not hide the latency.
  static constexpr int kWideTokens = Isa::qk_m, kNarrowTokens = 2 * Isa::qk_m;
  static constexpr int kValueRows = M::pairs ? Isa::pair_m : Isa::pv_m;
  static constexpr int kValueVectors = M::pairs ? Isa::pair_n : Isa::pv_n;
  static_assert(kBlock % kNarrowTokens == 0 && kBlock % 2 == 0 && kChunk % W == 0 && W % kValueRows == 0);

public:
  LaneAttention(const FlashmlaDecode& call, const Item& item, const Accumulator& into, char* memory)
      : call_(call), item_(item), into_(into), rows_(round_up(item.rows, W)) {
    Scratch scratch(memory);
    plan(scratch);
  }

  static ScratchBytes scratch_bytes(const FlashmlaDecode& call, const Item& item) {
    return LaneAttention(call, item, {}, nullptr).bytes_;
  }

  bool run(int64_t begin, int64_t end) {
    pack_queries();
    std::memset(zeros_, 0, size_t(call_.d_v) * sizeof(T));
    for (int64_t r = 0; r < rows_; r++) into_.m[r] = -INFINITY, into_.l[r] = 0;
    if (call_.levels > 1) return pass(begin, end, true, true);
    return pass(begin, end, true, false) && pass(begin, end, false, true);
  }

private:
  // Over the blocks of tokens [begin, end): their scores and the maximum, their weights and values, or both at once.
  bool pass(int64_t begin, int64_t end, bool scores, bool values) {
    const auto block = [&](Rows<Row, kBlock>& here, int64_t t, auto each) __attribute__((always_inline)) {
      scores_ = call_.levels > 1 ? all_scores_ : all_scores_ + (t - begin) * rows_;
      stage(here);
      look(here.n, t);
      if (scores) {
        for (const Part& part : parts_) score(part, here, each);
        cap();
      }
      weigh(scores, values);
      if (values) accumulate(here, t == begin, each);
    };
    return for_blocks<Row, kBlock>(call_, item_, begin, end, decoded_, [&](int n) { return steps(n); }, block);
  }

  // A part of the keys: what comes from one cache tensor. Chunks do not cross parts.
  struct Part {
    int64_t d, offset, token_stride;  // elements: how many, where in the row they start, from row to row
    bool second;                      // in k_cache
    int64_t unit, units, chunk;       // the first unit, how many, and the first chunk
    bool in_place;                    // all units are whole
  };

  void plan(Scratch& scratch) {
    parts_[0] = {call_.kv.d - call_.qk_start, call_.qk_start, token_stride<Row>(call_.kv), false, 0, 0, 0, false};
    parts_[1] = {call_.k.d, 0, call_.k.token_stride, true, 0, 0, 0, false};
    for (Part& part : parts_) {
      part.unit = key_units_, part.units = S::units(part.d), part.chunk = chunks_;
      part.in_place = kInPlace && part.d % S::kPerUnit == 0;
      key_units_ += part.units, chunks_ += S::chunks(part.units);
    }
    // A staged value is read from the staged key if it is a prefix of it.
    const bool stage_values = !kInPlace && call_.qk_start != 0;
    queries_ = scratch.take<Unit>(rows_ * key_units_);
    keys_ = scratch.take<Unit>(chunks_ * kBlock * kChunk);
    values_ = stage_values ? scratch.take<Unit>(S::chunks(call_.d_v) * kBlock * kChunk) : keys_;
    zeros_ = scratch.take<T>(call_.d_v);
    decoded_ = scratch.take<T>(decoded_elements<Row, kBlock>(call_.kv));
    bytes_.copies = scratch.used();
    all_scores_ = scratch.take<float>(rows_ * (call_.levels > 1 ? kBlock : round_up(item_.length, kBlock)));
    weights_ = M::pairs ? scratch.take<Unit>(rows_ * kBlock / 2) : nullptr;
    rescale_ = scratch.take<float>(rows_);
    visible_ = scratch.take<float>(rows_);
    hidden_ = scratch.take<float>(rows_);
    bytes_.scores = scratch.used() - bytes_.copies;
  }

  int64_t panel_width(int64_t row) const { return rows_ - row < kPanel ? rows_ - row : kPanel; }
  int64_t tile_tokens(int64_t row) const { return panel_width(row) == kPanel ? kWideTokens : kNarrowTokens; }

  // [panel][unit][row of the panel]; rows past the item's are zero.
  void pack_queries() {
    for (int64_t first = 0; first < rows_; first += kPanel) {
      const int64_t width = panel_width(first);
      for (int64_t r = 0; r < width; r++) {
        const bool real = first + r < item_.rows;
        const Q* q = real ? query<Q>(call_, item_, item_.row + first + r) : nullptr;
        for (const Part& part : parts_) {
          pack_part(queries_ + first * key_units_ + r + part.unit * width, width, q, part.d);
          if (real) q += part.d * call_.q_stride[3];
        }
      }
    }
  }
  // Negated where the scale is negative, so that the largest score is the largest in the end.
  void pack_part(Unit* to, int64_t width, const Q* q, int64_t d) {
    const int64_t stride = call_.q_stride[3];
    const bool negate = call_.softmax_scale < 0;
    for (int64_t u = 0; u < S::units(d); u++, to += width) {
      if constexpr (M::pairs) {
        const int64_t i = 2 * u;
        *to = q == nullptr ? 0 : q[i * stride].bits | (i + 1 < d ? uint32_t{q[(i + 1) * stride].bits} << 16 : 0);
        if (negate) *to ^= 0x80008000u;
      } else {
        *to = q == nullptr ? 0 : negate ? -to_float(q[u * stride]) : to_float(q[u * stride]);
      }
    }
  }

  // The tile that holds token t lies in one page, all its tokens being real.
  static bool regular(const Rows<Row, kBlock>& rows, int64_t t) {
    const int64_t first = t / kNarrowTokens * kNarrowTokens;
    return rows.page_end[first] >= first + kNarrowTokens;
  }

  void stage(const Rows<Row, kBlock>& rows) {
    for (int64_t first = 0; first < rows.n; first += kNarrowTokens) {
      const int64_t last = rows.n < first + kNarrowTokens ? rows.n : first + kNarrowTokens;
      for (const Part& part : parts_) {
        if (part.d == 0 || (part.in_place && regular(rows, first))) continue;
        for (int64_t t = first; t < last; t++) S::put(keys_, kBlock, t, part.chunk, row(part, rows, t), part.d);
      }
      if (values_ == keys_) continue;
      for (int64_t t = first; t < last; t++) S::put(values_, kBlock, t, 0, rows.kv[t], call_.d_v);
    }
    // Tiles read whole groups of tokens: what they read past the last one must be finite.
    for (int64_t t = rows.n; t < round_up(rows.n, kNarrowTokens); t++) {
      for (int64_t c = 0; c < chunks_; c++) std::memset(keys_ + (c * kBlock + t) * kChunk, 0, kChunk * sizeof(Unit));
    }
  }
  static const T* row(const Part& part, const Rows<Row, kBlock>& rows, int64_t t) {
    return (part.second ? rows.k[t] : rows.kv[t]) + part.offset;
  }

  // How often `each` is called in a block: what prefetches are spread over.
  int64_t steps(int n) const {
    const auto stepped = [](int64_t units) { return Isa::step ? (units + Isa::step - 1) / Isa::step : 1; };
    int64_t steps = 0;
    for (int64_t first = 0; first < rows_; first += kPanel) {
      const int64_t tiles = (n + tile_tokens(first) - 1) / tile_tokens(first);
      for (const Part& part : parts_) {
        if (part.units) steps += tiles * (Isa::step || rows_ == W ? stepped(part.units) : S::chunks(part.units));
      }
    }
    const int64_t wide = kValueVectors * W, tiles = rows_ / kValueRows * ((call_.d_v + wide - 1) / wide);
    return steps + tiles * stepped(value_units(n));
  }
  static int value_units(int n) { return (n + kTokensPerUnit - 1) / kTokensPerUnit; }

  template <class Each>
  void score(const Part& part, const Rows<Row, kBlock>& rows, Each each) {
    // A single vector of queries stays in L1 whole, and scores need not be stored and loaded between chunks.
    const int64_t pass = rows_ == W ? part.units : kChunk;
    for (int64_t begin = 0; begin < part.units; begin += pass) {
      const int64_t end = begin + pass < part.units ? begin + pass : part.units;
      for (int64_t first = 0; first < rows_; first += kPanel) {
        const int64_t step = tile_tokens(first), tokens = seen(first + panel_width(first));
        for (int64_t t = unseen(first) / step * step; t < tokens; t += step)
          score_tokens(part, rows, first, t, begin, end, each);
      }
    }
  }
  // One tile of tokens from t on, one panel of queries from `first` on, units [begin, end) of a part.
  template <class Each>
  __attribute__((always_inline)) void score_tokens(const Part& part, const Rows<Row, kBlock>& rows, int64_t first,
                                                   int64_t t, int64_t begin, int64_t end, Each each) {
    const int64_t width = panel_width(first);
    const Unit* queries = queries_ + first * key_units_ + part.unit * width;
    float* scores = scores_ + first * kBlock + t * width;
    const bool in_place = part.in_place && regular(rows, t);
    for (int64_t u = begin, count; u < end; u += count) {
      count = in_place || end - u < kChunk ? end - u : kChunk;
      const void* keys = keys_ + ((part.chunk + u / kChunk) * kBlock + t) * kChunk;
      int64_t stride = kChunk * sizeof(Unit);
      if (in_place) {
        keys = row(part, rows, t) + u * S::kPerUnit, stride = part.token_stride * int64_t{sizeof(T)};
      }
      const bool fresh = part.unit + u == 0;
      if (width == kPanel) {
        score_tile<M, kWideTokens, Isa::qk_n>({keys, stride}, queries + u * width, scores, int(count), fresh, each);
      } else {
        score_tile<M, kNarrowTokens, 1>({keys, stride}, queries + u * width, scores, int(count), fresh, each);
      }
    }
  }

  // How many tokens of the block rows up to `end` see: a row sees as many as the one before, or more.
  int seen(int64_t end) const { return int(visible_[end - 1]); }
  // How many of its first tokens no row from `begin` on sees.
  int unseen(int64_t begin) const { return int(hidden_[begin]); }
  void look(int n, int64_t first_token) {
    const int64_t group = group_size(call_);
    int64_t left = group - item_.row % group;
    Tokens sees = visible(call_, item_, item_.row);
    sees.begin -= first_token, sees.end -= first_token;
    const int64_t last = visible(call_, item_, item_.row + rows_ - 1).begin - first_token;
    whole_ = sees.end >= n && last <= 0;
    if (whole_) {
      std::fill(visible_, visible_ + rows_, float(n)), std::fill(hidden_, hidden_ + rows_, 0.0f);
      return;
    }
    const auto in_block = [n](int64_t token) { return float(token < 0 ? 0 : token > n ? n : token); };
    for (int64_t r = 0; r < rows_; r++, left--) {
      if (left == 0) {
        sees = visible(call_, item_, item_.row + r), left = group;
        sees.begin -= first_token, sees.end -= first_token;
      }
      visible_[r] = in_block(sees.end), hidden_[r] = in_block(sees.begin);
    }
  }

  void cap() {
    if (!(call_.softcap > 0)) return;
    for (int64_t first = 0; first < rows_; first += kPanel) {
      const int64_t width = panel_width(first), begin = unseen(first), end = seen(first + width);
      float* scores = scores_ + first * kBlock + begin * width;
      if (begin < end) cap_scores<Isa>(call_, scores, (end - begin) * width, std::fabs(call_.softmax_scale));
    }
  }

  // Scores become weights, where they are, or for pairs two tokens' in one unit: [vector of rows][token pair][W].
  // At level 1 the maximum of all blocks is found first.
  void weigh(bool find_maximum, bool weigh_them) {
    const F scale = Isa::set1(std::fabs(score_scale(call_)));
    for (int64_t r = 0; r < rows_; r += W) {
      const int64_t first = r / kPanel * kPanel, width = panel_width(first);
      float* scores = scores_ + first * kBlock + (r - first);
      const int begin = unseen(r) / kExp * kExp, n = seen(r + W);
      const bool all = whole_ || (visible_[r] >= n && hidden_[r + W - 1] <= begin);
      const F hidden = Isa::load(hidden_ + r), visible = Isa::load(visible_ + r);
      const BlockScores<Isa> block{scores, width, begin, n, scale, hidden, visible, all};
      const F old = Isa::load(into_.m + r), maximum = find_maximum ? block.maximum(old) : old;
      Isa::store(into_.m + r, maximum);
      if (!weigh_them) continue;
      const auto each = [&](int t, const F(&p)[kExp]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < kExp; i += kTokensPerUnit) {
          if constexpr (M::pairs) {
            Isa::store(weights_ + r * kBlock / 2 + (t + i) / 2 * W, Isa::pack(p[i], p[i + 1]));
          } else {
            Isa::store(scores + (t + i) * width, p[i]);
          }
        }
      };
      Isa::store(rescale_ + r, block.weigh(old, maximum, into_.l + r, each));
    }
  }

  template <class Each>
  void accumulate(Rows<Row, kBlock>& rows, bool first_block, Each each) {
    if (rows.n % kTokensPerUnit) rows.kv[rows.n] = zeros_;
    const int64_t whole = call_.d_v / W, vectors = kInPlace ? whole : (call_.d_v + W - 1) / W;
    for (int64_t v = 0; v < vectors;) {
      const int64_t chunk_left = kChunk / W - v % (kChunk / W),
                    left = vectors - v < chunk_left ? vectors - v : chunk_left;
      if (kValueVectors >= 3 && left != 4 && left >= 3) {
        accumulate_columns<kValueVectors, false>(rows, v * W, first_block, each), v += kValueVectors;
      } else if (kValueVectors >= 2 && left >= 2) {  // 4 as 2 + 2: a lone vector's accumulators do not hide the latency
        accumulate_columns<2, false>(rows, v * W, first_block, each), v += 2;
      } else {
        accumulate_columns<1, false>(rows, v * W, first_block, each), v += 1;
      }
    }
    if (vectors * W < call_.d_v) accumulate_columns<1, true>(rows, vectors * W, first_block, each);
  }
  // N vectors of columns, or (PART) the last columns, which are less than a vector.
  template <int N, bool PART, class Each>
  void accumulate_columns(const Rows<Row, kBlock>& rows, int64_t column, bool first_block, Each each) {
    const Unit* staged = values_ + (column / kChunk * kBlock) * kChunk + column % kChunk;
    const T* const* tokens = rows.kv;
    const auto values = [=, this](int t, int n) __attribute__((always_inline)) {
      if constexpr (!kInPlace) {
        return Isa::load(staged + t * kChunk + n * W);
      } else if constexpr (M::pairs) {
        const T *one = tokens[2 * t] + column, *two = tokens[2 * t + 1] + column;
        return PART ? Isa::interleave(part(one).elements, part(two).elements)
                    : Isa::interleave(one + n * W, two + n * W);
      } else {
        const T* value = tokens[t] + column + n * W;
        return PART ? Isa::load(part(value).elements) : Isa::load(value);
      }
    };
    for (int64_t r = 0; r < rows_; r += kValueRows) {
      const int first_unit = unseen(r / W * W) / kExp * kExp / kTokensPerUnit;
      const auto later = [&](int t, int n) __attribute__((always_inline)) { return values(first_unit + t, n); };
      const Unit* weights;
      int64_t stride;
      if constexpr (M::pairs) {
        weights = weights_ + r / W * W * kBlock / 2 + r % W, stride = W;
      } else {
        const int64_t first = r / kPanel * kPanel;
        weights = scores_ + first * kBlock + (r - first), stride = panel_width(first);
      }
      const int units = value_units(seen(r / W * W + W)) - first_unit;
      value_tile<M, kValueRows, N>(weights + first_unit * stride, stride, later, into_.o + r * into_.stride + column,
                                   into_.stride, rescale_ + r, units, first_block, each);
    }
  }
  struct Vector {
    T elements[W];
  };
  Vector part(const T* from) const {
    Vector whole{};
    std::memcpy(whole.elements, from, size_t(call_.d_v % W) * sizeof(T));
    return whole;
  }

  const FlashmlaDecode& call_;
  const Item& item_;
  const Accumulator into_;
  const int64_t rows_;  // padded to whole vectors
  Part parts_[2];
  int64_t key_units_ = 0, chunks_ = 0;
  ScratchBytes bytes_{};
  Unit *queries_, *keys_, *values_, *weights_;
  T* zeros_;    // a row of them: the partner of the last token where their number is odd
  T* decoded_;  // the block's rows, where they are not read in place
  float *all_scores_, *rescale_;
  float *visible_, *hidden_;  // of each row, how many of the block's tokens come before its last one, and its first
  bool whole_ = true;         // every row sees the whole block
  float* scores_ = nullptr;   // of the block: level 1 keeps those of all blocks
};

}  // namespace flashmla::FLASHMLA_ISA
