// Attention for few query rows a KV head (GQA, MHA, MLA with one to a few heads), where a lane a row would leave most
// lanes empty: lanes run along the row. Rows are read in place, each key and value once for up to four query rows; what
// bounds this is memory, not arithmetic.
#pragma once

#include "flashmla/rows.h"
#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

template <class Isa, class T>
class DotAttention {
  using F = typename Isa::F;
  static constexpr int W = Isa::W, kBlock = 64;

public:
  // More rows than half a vector go to LaneAttention: it wastes less than half of its lanes then, and reads faster.
  static constexpr int64_t kMaxRows = W / 2;

  DotAttention(const FlashmlaDecode& call, const Item& item, const Accumulator& into, char* memory)
      : call_(call), item_(item), into_(into), head_part_(call.kv.d - call.qk_start) {
    Scratch scratch(memory);
    query_stride_ = round_up(head_part_, W) + round_up(call.k.d, W);
    queries_ = scratch.take<float>(item.rows * query_stride_);
    scores_ = scratch.take<float>(item.rows * kBlock);
    rescale_ = scratch.take<float>(item.rows);
    bytes_ = scratch.used();
  }

  static int64_t scratch_bytes(const FlashmlaDecode& call, int64_t rows) {
    Item item{};
    item.rows = rows;
    return DotAttention(call, item, {}, nullptr).bytes_;
  }

  bool run(int64_t begin, int64_t end) {
    unpack_queries();
    for (int64_t r = 0; r < item_.rows; r++) {
      into_.m[r] = -INFINITY, into_.l[r] = 0;
      std::memset(into_.o + r * into_.stride, 0, size_t(call_.d_v) * sizeof(float));
    }
    Rows<T, kBlock> blocks[2];
    if (!blocks[0].locate(call_, item_, begin, end < begin + kBlock ? end : begin + kBlock)) return false;
    int current = 0;
    for (int64_t t = begin; t < end; t += kBlock, current ^= 1) {
      const int64_t next = t + kBlock, last = end < next + kBlock ? end : next + kBlock;
      Rows<T, kBlock>&here = blocks[current], &ahead = blocks[current ^ 1];
      if (!ahead.locate(call_, item_, next, last)) return false;
      score(here, ahead);
      weigh(here.n, t);
      for (int64_t r = 0; r < item_.rows;) {
        const int64_t left = item_.rows - r;
        if (left >= 4)
          accumulate<4>(here, r), r += 4;
        else if (left >= 2)
          accumulate<2>(here, r), r += 2;
        else
          accumulate<1>(here, r), r += 1;
      }
    }
    return true;
  }

private:
  // Queries as floats, each key part padded with zeros to whole vectors.
  void unpack_queries() {
    for (int64_t r = 0; r < item_.rows; r++) {
      const T* q = query<T>(call_, item_, item_.row + r);
      float* to = queries_ + r * query_stride_;
      std::memset(to, 0, size_t(query_stride_) * sizeof(float));
      const int64_t gap = round_up(head_part_, W) - head_part_;
      for (int64_t i = 0; i < call_.d_qk; i++) to[i < head_part_ ? i : i + gap] = to_float(q[i * call_.q_stride[3]]);
    }
  }

  void score(const Rows<T, kBlock>& rows, const Rows<T, kBlock>& ahead) {
    Prefetcher<T, kBlock> prefetch(call_, ahead, rows.n);
    for (int t = 0; t < rows.n; t++) {
      prefetch.step();
      for (int64_t r = 0; r < item_.rows;) {
        const int64_t left = item_.rows - r;
        if (left >= 4)
          score_token<4>(rows, t, r), r += 4;
        else if (left >= 2)
          score_token<2>(rows, t, r), r += 2;
        else
          score_token<1>(rows, t, r), r += 1;
      }
    }
  }
  template <int R>
  void score_token(const Rows<T, kBlock>& rows, int t, int64_t row) {
    F c[R][2] = {};
    const float* q = queries_ + row * query_stride_;
    dot<R>(c, rows.kv[t] + call_.qk_start, q, head_part_);
    if (call_.k.d) dot<R>(c, rows.k[t], q + round_up(head_part_, W), call_.k.d);
    for (int i = 0; i < R; i++) scores_[(row + i) * kBlock + t] = Isa::sum(c[i][0] + c[i][1]);
  }
  template <int R>
  void dot(F (&c)[R][2], const T* key, const float* q, int64_t d) {
    int64_t i = 0;
    for (; i + 2 * W <= d; i += 2 * W) {
      const F first = Isa::load(key + i), second = Isa::load(key + i + W);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        c[r][0] = Isa::fma(first, Isa::load(q + r * query_stride_ + i), c[r][0]);
        c[r][1] = Isa::fma(second, Isa::load(q + r * query_stride_ + i + W), c[r][1]);
      }
    }
    for (; i < d; i += W) {
      const F rest = i + W <= d ? Isa::load(key + i) : load_part(key + i, d - i);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) c[r][0] = Isa::fma(rest, Isa::load(q + r * query_stride_ + i), c[r][0]);
    }
  }
  static F load_part(const T* p, int64_t n) {
    T whole[W] = {};
    std::memcpy(whole, p, size_t(n) * sizeof(T));
    return Isa::load(whole);
  }

  // Here a lane is a token: the block is padded with -inf to whole vectors.
  void weigh(int n, int64_t first_token) {
    const F scale = Isa::set1(call_.softmax_scale * kLog2E);
    for (int64_t r = 0; r < item_.rows; r++) {
      float* scores = scores_ + r * kBlock;
      const int64_t seen = visible(call_, item_, item_.row + r) - first_token;
      F maximum = Isa::set1(into_.m[r]);
      for (int t = 0; t < n; t += W) {
        Isa::store(scores + t, Isa::load(scores + t) * scale);
        for (int64_t i = seen < n ? seen : n; i < t + W; i++) {
          if (i >= t) scores[i] = -INFINITY;
        }
        maximum = Isa::max(maximum, Isa::load(scores + t));
      }
      const float m = Isa::max(maximum);
      const F subtract = finite_maximum(Isa::set1(m));
      const F rescale = exp2<Isa>(Isa::set1(into_.m[r]) - subtract);
      F total{};
      for (int t = 0; t < n; t += W) {
        const F p = exp2<Isa>(Isa::load(scores + t) - subtract);
        Isa::store(scores + t, p);
        total += p;
      }
      rescale_[r] = rescale[0];
      into_.m[r] = m;
      into_.l[r] = into_.l[r] * rescale[0] + Isa::sum(total);
    }
  }

  template <int R>
  void accumulate(const Rows<T, kBlock>& rows, int64_t row) {
    int64_t c = 0;
    for (; c + 2 * W <= call_.d_v; c += 2 * W) accumulate_columns<R, 2>(rows, row, c, 2 * W);
    for (; c + W <= call_.d_v; c += W) accumulate_columns<R, 1>(rows, row, c, W);
    if (c < call_.d_v) accumulate_columns<R, 1>(rows, row, c, call_.d_v - c);
  }
  template <int R, int N>
  void accumulate_columns(const Rows<T, kBlock>& rows, int64_t row, int64_t column, int64_t width) {
    F c[R][N];
    float* o = into_.o + row * into_.stride + column;
    for (int r = 0; r < R; r++)
      for (int i = 0; i < N; i++) c[r][i] = Isa::load(o + r * into_.stride + i * W) * Isa::set1(rescale_[row + r]);
    const float* weights = scores_ + row * kBlock;
    for (int t = 0; t < rows.n; t++) {
      const T* value = rows.kv[t] + column;
      F v[N];
      if (width < W) {
        v[0] = load_part(value, width);
      } else {
        for (int i = 0; i < N; i++) v[i] = Isa::load(value + i * W);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int i = 0; i < N; i++) c[r][i] = Isa::fma(v[i], Isa::set1(weights[r * kBlock + t]), c[r][i]);
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < N; i++) Isa::store(o + r * into_.stride + i * W, c[r][i]);
  }

  const FlashmlaDecode& call_;
  const Item& item_;
  const Accumulator into_;
  const int64_t head_part_;  // elements of the key in the first tensor
  int64_t query_stride_, bytes_;
  float *queries_, *scores_, *rescale_;
};

}  // namespace flashmla::FLASHMLA_ISA
