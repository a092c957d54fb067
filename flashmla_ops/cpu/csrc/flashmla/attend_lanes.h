// Attention for many query rows over the same keys (MLA: all heads of a token): a lane is a query row.
//
// For each block of tokens: stage the rows; S^T = K Q^T with the queries packed once per item; online softmax with
// nothing horizontal; O = O * rescale + P V. Every row of the cache is read once for all query rows.
#pragma once

#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/stage.h"

namespace flashmla::FLASHMLA_ISA {

template <class Isa, class T>
class LaneAttention {
  using M = Mac<Isa, T>;
  using S = Stage<Isa, T>;
  using Unit = typename M::Unit;
  using F = typename Isa::F;
  static constexpr int W = Isa::W, kPanel = Isa::qk_n * W, kBlock = Isa::block;
  static constexpr int kTokensPerUnit = M::pairs ? 2 : 1;  // of a value
  // A panel of one vector takes twice the tokens: qk_m accumulators alone would not hide the latency.
  static constexpr int kWideTokens = Isa::qk_m, kNarrowTokens = 2 * Isa::qk_m;
  static_assert(kBlock % kNarrowTokens == 0 && kBlock % 2 == 0 && kChunk % W == 0 && W % Isa::pv_m == 0);

public:
  LaneAttention(const FlashmlaDecode& call, const Item& item, const Accumulator& into, char* memory)
      : call_(call), item_(item), into_(into), rows_(round_up(item.rows, W)) {
    Scratch scratch(memory);
    plan(scratch);
  }

  static int64_t scratch_bytes(const FlashmlaDecode& call, int64_t rows) {
    Item item{};
    item.rows = rows;
    LaneAttention sized(call, item, {}, nullptr);
    return sized.bytes_;
  }

  bool run(int64_t begin, int64_t end) {
    pack_queries();
    for (int64_t r = 0; r < rows_; r++) into_.m[r] = -INFINITY, into_.l[r] = 0;
    Rows<T, kBlock> blocks[2];
    if (!blocks[0].locate(call_, item_, begin, end < begin + kBlock ? end : begin + kBlock)) return false;
    int current = 0;
    for (int64_t t = begin; t < end; t += kBlock, current ^= 1) {
      const int64_t next = t + kBlock, last = end < next + kBlock ? end : next + kBlock;
      Rows<T, kBlock>&here = blocks[current], &ahead = blocks[current ^ 1];
      if (!ahead.locate(call_, item_, next, last)) return false;
      stage(here);
      score(here.n, ahead);
      weigh(here.n, t);
      accumulate(here.n, t == begin);
    }
    return true;
  }

private:
  void plan(Scratch& scratch) {
    key_units_ = S::key_units(call_);
    // The value can be read from the staged key if it is a prefix of it, element by element.
    shared_ = !M::pairs && call_.qk_start == 0;
    queries_ = scratch.take<Unit>(rows_ * key_units_);
    keys_ = scratch.take<Unit>(S::chunks(key_units_) * kBlock * kChunk);
    value_capacity_ = kBlock / kTokensPerUnit;
    values_ = shared_ ? keys_ : scratch.take<Unit>(S::chunks(call_.d_v) * value_capacity_ * kChunk);
    scores_ = scratch.take<float>(rows_ * kBlock);
    weights_ = M::pairs ? scratch.take<Unit>(rows_ * value_capacity_) : nullptr;
    rescale_ = scratch.take<float>(rows_);
    visible_ = scratch.take<float>(rows_);
    bytes_ = scratch.used();
  }

  int64_t panel_width(int64_t row) const { return rows_ - row < kPanel ? rows_ - row : kPanel; }
  int64_t tile_tokens(int64_t row) const { return panel_width(row) == kPanel ? kWideTokens : kNarrowTokens; }

  // [panel][unit][row of the panel]; rows past the item's are zero.
  void pack_queries() {
    for (int64_t first = 0; first < rows_; first += kPanel) {
      const int64_t width = panel_width(first);
      Unit* panel = queries_ + first * key_units_;
      for (int64_t r = 0; r < width; r++) {
        const bool real = first + r < item_.rows;
        const T* q = real ? query<T>(call_, item_, item_.row + first + r) : nullptr;
        const int64_t head_part = call_.kv.d - call_.qk_start;
        pack_part(panel + r, width, q, head_part);
        pack_part(panel + r + S::units(head_part) * width, width, q ? q + head_part * call_.q_stride[3] : q, call_.k.d);
      }
    }
  }
  void pack_part(Unit* to, int64_t width, const T* q, int64_t d) {
    const int64_t stride = call_.q_stride[3];
    for (int64_t u = 0; u < S::units(d); u++, to += width) {
      if constexpr (M::pairs) {
        const int64_t i = 2 * u;
        *to = q == nullptr ? 0 : q[i * stride].bits | (i + 1 < d ? uint32_t{q[(i + 1) * stride].bits} << 16 : 0);
      } else {
        *to = q == nullptr ? 0 : to_float(q[u * stride]);
      }
    }
  }

  void stage(const Rows<T, kBlock>& rows) {
    const int64_t head_part = call_.kv.d - call_.qk_start, split = S::units(head_part);
    for (int t = 0; t < rows.n; t++) {
      S::put(keys_, kBlock, t, 0, rows.kv[t] + call_.qk_start, head_part);
      if (call_.k.d) S::put(keys_, kBlock, t, split, rows.k[t], call_.k.d);
    }
    // Tiles read whole groups of tokens: what they read past the last one must be finite.
    for (int64_t t = rows.n; t < round_up(rows.n, kNarrowTokens); t++) {
      for (int64_t c = 0; c < S::chunks(key_units_); c++) {
        std::memset(keys_ + (c * kBlock + t) * kChunk, 0, kChunk * sizeof(Unit));
      }
    }
    if (!shared_) S::put_values(values_, value_capacity_, rows.kv, rows.n, call_.d_v);
  }

  void score(int n, const Rows<T, kBlock>& ahead) {
    const int64_t chunks = S::chunks(key_units_);
    int64_t tiles = 0;
    for (int64_t first = 0; first < rows_; first += kPanel) tiles += (n + tile_tokens(first) - 1) / tile_tokens(first);
    Prefetcher<T, kBlock> prefetch(call_, ahead, chunks * tiles);
    for (int64_t c = 0; c < chunks; c++) {
      const int units = int(key_units_ - c * kChunk < kChunk ? key_units_ - c * kChunk : kChunk);
      for (int64_t first = 0; first < rows_; first += kPanel) {
        const int64_t width = panel_width(first), step = tile_tokens(first);
        const Unit* queries = queries_ + first * key_units_ + c * kChunk * width;
        for (int64_t t = 0; t < n; t += step) {
          prefetch.step();
          const Unit* keys = keys_ + (c * kBlock + t) * kChunk;
          float* scores = scores_ + first * kBlock + t * width;
          if (width == kPanel) {
            score_tile<M, kWideTokens, Isa::qk_n>(keys, queries, scores, units, c == 0);
          } else {
            score_tile<M, kNarrowTokens, 1>(keys, queries, scores, units, c == 0);
          }
        }
      }
    }
  }

  // Scores become weights; for pairs, weights of two tokens are packed into one unit: [vector of rows][token pair][W].
  void weigh(int n, int64_t first_token) {
    int64_t least = n;
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t seen = visible(call_, item_, item_.row + (r < item_.rows ? r : item_.rows - 1)) - first_token;
      visible_[r] = seen < 0 ? 0.0f : seen > n ? float(n) : float(seen);
      least = seen < least ? seen : least;
    }
    const F scale = Isa::set1(call_.softmax_scale * kLog2E);
    for (int64_t r = 0; r < rows_; r += W) {
      const int64_t first = r / kPanel * kPanel, width = panel_width(first);
      float* scores = scores_ + first * kBlock + (r - first);
      const F factor =
          softmax_block<Isa>(scores, width, n, scale, Isa::load(visible_ + r), least >= n, into_.m + r, into_.l + r);
      Isa::store(rescale_ + r, factor);
      if constexpr (M::pairs) {
        for (int t = 0; t < n; t += 2) {
          const F second = t + 1 < n ? Isa::load(scores + (t + 1) * width) : F{};
          Isa::store(weights_ + r * value_capacity_ + t / 2 * W, Isa::pack(Isa::load(scores + t * width), second));
        }
      }
    }
  }

  void accumulate(int n, bool first_block) {
    const int units = (n + kTokensPerUnit - 1) / kTokensPerUnit;
    for (int64_t c = 0; c < call_.d_v; c += kChunk) {
      const int64_t vectors = ((call_.d_v - c < kChunk ? call_.d_v - c : kChunk) + W - 1) / W;
      const Unit* chunk = values_ + c / kChunk * value_capacity_ * kChunk;
      for (int64_t v = 0; v < vectors;) {
        const int64_t left = vectors - v;
        if (Isa::pv_n >= 3 && left != 4 && left >= 3) {
          accumulate_columns<Isa::pv_n>(chunk + v * W, c + v * W, units, first_block), v += Isa::pv_n;
        } else if (left >= 2) {  // 4 vectors as 2 + 2: a lone vector has too few accumulators to hide the latency
          accumulate_columns<2>(chunk + v * W, c + v * W, units, first_block), v += 2;
        } else {
          accumulate_columns<1>(chunk + v * W, c + v * W, units, first_block), v += 1;
        }
      }
    }
  }
  template <int N>
  void accumulate_columns(const Unit* values, int64_t column, int units, bool first_block) {
    for (int64_t r = 0; r < rows_; r += Isa::pv_m) {
      const Unit* weights;
      int64_t stride;
      if constexpr (M::pairs) {
        weights = weights_ + r / W * W * value_capacity_ + r % W, stride = W;
      } else {
        const int64_t first = r / kPanel * kPanel;
        weights = scores_ + first * kBlock + (r - first), stride = panel_width(first);
      }
      value_tile<M, Isa::pv_m, N>(weights, stride, values, into_.o + r * into_.stride + column, into_.stride,
                                  rescale_ + r, units, first_block);
    }
  }

  const FlashmlaDecode& call_;
  const Item& item_;
  const Accumulator into_;
  const int64_t rows_;  // padded to whole vectors
  int64_t key_units_, value_capacity_, bytes_;
  bool shared_;
  Unit *queries_, *keys_, *values_, *weights_;
  float *scores_, *rescale_, *visible_;
};

}  // namespace flashmla::FLASHMLA_ISA
