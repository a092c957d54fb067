// Attention for few query rows a KV head (GQA, MHA, MLA with one to a few heads), where a lane a row would leave most
// lanes empty: lanes run along the row. (Pairs of bf16: see FewAttention.) Rows are read in
// place, each key and value once for up to four query rows; what bounds this is memory, not arithmetic.
#pragma once

#include <algorithm>

#include "flashmla/rows.h"
#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

// More rows go to LaneAttention. Measured with AVX2 (8 lanes) at 8 rows: 35 % less time here for GQA rows in fp32 and
// 7 % in bf16, 9 % less and 4 % more for MLA rows; with 16 lanes, lanes would be half empty.
constexpr int64_t kFewRows = 8;

template <class Isa, class Q, class Row>
class DotAttention {
  using T = typename Row::Element;
  using F = typename Isa::F;
  static constexpr int W = Isa::W, kBlock = 64;

public:
  DotAttention(const FlashmlaDecode& call, const Item& item, const Accumulator& into, char* memory)
      : call_(call), item_(item), into_(into), head_part_(call.kv.d - call.qk_start) {
    Scratch scratch(memory);
    query_stride_ = round_up(head_part_, W) + round_up(call.k.d, W);
    queries_ = scratch.take<float>(item.rows * query_stride_);
    decoded_ = scratch.take<T>(decoded_elements<Row, kBlock>(call.kv));
    bytes_.copies = scratch.used();
    all_scores_ = scratch.take<float>(item.rows * (call.levels > 1 ? kBlock : round_up(item.length, kBlock)));
    rescale_ = scratch.take<float>(item.rows);
    bytes_.scores = scratch.used() - bytes_.copies;
  }

  static ScratchBytes scratch_bytes(const FlashmlaDecode& call, const Item& item) {
    return DotAttention(call, item, {}, nullptr).bytes_;
  }

  bool run(int64_t begin, int64_t end) {
    unpack_queries();
    for (int64_t r = 0; r < item_.rows; r++) {
      into_.m[r] = -INFINITY, into_.l[r] = 0;
      std::memset(into_.o + r * into_.stride, 0, size_t(call_.d_v) * sizeof(float));
    }
    if (call_.levels > 1) return pass(begin, end, true, true);
    return pass(begin, end, true, false) && pass(begin, end, false, true);
  }

private:
  // Does what LaneAttention's does.
  bool pass(int64_t begin, int64_t end, bool scores, bool values) {
    const auto block = [&](Rows<Row, kBlock>& here, int64_t t, auto each) __attribute__((always_inline)) {
      scores_ = call_.levels > 1 ? all_scores_ : all_scores_ + (t - begin) * item_.rows;
      if (scores) score(here, each);
      weigh(here.n, t, scores, values);
      if (values) for_rows([&](auto count, int64_t row) { accumulate<count()>(here, row); });
    };
    return for_blocks<Row, kBlock>(call_, item_, begin, end, decoded_, [](int n) { return n; }, block);
  }

  // Calls f(count, first row) for groups of query rows that share what is read: all eight, or up to four at a time.
  template <class Call>
  __attribute__((always_inline)) void for_rows(Call f) {
    const int64_t rows = item_.rows;
    if (rows == 8) return f(std::integral_constant<int, 8>{}, 0);
    if (rows >= 4) f(std::integral_constant<int, 4>{}, 0);
    const int64_t rest = rows % 4;
    if (rest == 3) f(std::integral_constant<int, 3>{}, rows - rest);
    if (rest == 2) f(std::integral_constant<int, 2>{}, rows - rest);
    if (rest == 1) f(std::integral_constant<int, 1>{}, rows - rest);
  }

  // Queries as floats, each key part padded with zeros to whole vectors.
  void unpack_queries() {
    for (int64_t r = 0; r < item_.rows; r++) {
      const Q* q = query<Q>(call_, item_, item_.row + r);
      float* to = queries_ + r * query_stride_;
      std::memset(to, 0, size_t(query_stride_) * sizeof(float));
      const int64_t gap = round_up(head_part_, W) - head_part_;
      for (int64_t i = 0; i < call_.d_qk; i++) to[i < head_part_ ? i : i + gap] = to_float(q[i * call_.q_stride[3]]);
    }
  }

  template <class Each>
  void score(const Rows<Row, kBlock>& rows, Each each) {
    for (int t = 0; t < rows.n; t++) {
      each();
      for_rows([&](auto count, int64_t row) { score_token<count()>(rows, t, row); });
    }
  }
  template <int R>
  __attribute__((always_inline)) void score_token(const Rows<Row, kBlock>& rows, int t, int64_t row) {
    constexpr int C = R >= 8 ? 1 : 2;  // accumulators of one score: eight in all, or they wait for one another
    F c[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int u = 0; u < C; u++) c[r][u] = F{};
    const float* q = queries_ + row * query_stride_;
    dot<R, C>(c, rows.kv[t] + call_.qk_start, q, head_part_);
    if (call_.k.d) dot<R, C>(c, rows.k[t], q + round_up(head_part_, W), call_.k.d);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      F sum = c[i][0];
      if constexpr (C == 2) sum += c[i][1];
      scores_[(row + i) * kBlock + t] = Isa::sum(sum);
    }
  }
  template <int R, int C>
  __attribute__((always_inline)) void dot(F (&c)[R][C], const T* key, const float* q, int64_t d) {
    int64_t i = 0;
    for (; i + C * W <= d; i += C * W) {
#pragma GCC unroll 2
      for (int u = 0; u < C; u++) {
        const F part = Isa::load(key + i + u * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) c[r][u] = Isa::fma(part, Isa::load(q + r * query_stride_ + i + u * W), c[r][u]);
      }
    }
    for (; i < d; i += W) {
      const F rest = i + W <= d ? Isa::load(key + i) : load_part(key + i, d - i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) c[r][0] = Isa::fma(rest, Isa::load(q + r * query_stride_ + i), c[r][0]);
    }
  }
  static F load_part(const T* p, int64_t n) {
    T whole[W] = {};
    std::memcpy(whole, p, size_t(n) * sizeof(T));
    return Isa::load(whole);
  }

  // Here a lane is a token: the block is padded with -inf to whole vectors.
  void weigh(int n, int64_t first_token, bool scale_them, bool weigh_them) {
    for (int64_t r = 0; r < item_.rows; r++) {
      float* scores = scores_ + r * kBlock;
      const float old = into_.m[r];
      if (scale_them) {
        cap_scores<Isa>(call_, scores, round_up(n, W), call_.softmax_scale);
        const Tokens sees = visible(call_, item_, item_.row + r);
        into_.m[r] = scale_row(scores, n, {sees.begin - first_token, sees.end - first_token}, old);
      }
      if (!weigh_them) continue;
      const F subtract = finite_maximum(Isa::set1(into_.m[r]));
      const F rescale = exp2<Isa>(Isa::set1(old) - subtract);
      F total{};
      for (int t = 0; t < n; t += W) {
        const F p = exp2<Isa>(Isa::load(scores + t) - subtract);
        Isa::store(scores + t, p);
        total += p;
      }
      rescale_[r] = rescale[0];
      into_.l[r] = into_.l[r] * rescale[0] + Isa::sum(total);
    }
  }
  // Returns the larger of `old` and the scaled scores that the row sees.
  float scale_row(float* scores, int n, Tokens sees, float old) const {
    const F scale = Isa::set1(score_scale(call_));
    F maximum = Isa::set1(old);
    for (int t = 0; t < n; t += W) {
      Isa::store(scores + t, Isa::load(scores + t) * scale);
      for (int64_t i = t; i < t + W && i < sees.begin; i++) scores[i] = -INFINITY;
      for (int64_t i = std::max<int64_t>(sees.end < n ? sees.end : n, t); i < t + W; i++) scores[i] = -INFINITY;
      maximum = Isa::max(maximum, Isa::load(scores + t));
    }
    return Isa::max(maximum);
  }

  template <int R>
  void accumulate(const Rows<Row, kBlock>& rows, int64_t row) {
    constexpr int N = R >= 8 ? 1 : 2;  // eight accumulators, as above
    int64_t c = 0;
    for (; c + N * W <= call_.d_v; c += N * W) accumulate_columns<R, N, false>(rows, row, c);
    for (; c + W <= call_.d_v; c += W) accumulate_columns<R, 1, false>(rows, row, c);
    if (c < call_.d_v) accumulate_columns<R, 1, true>(rows, row, c);
  }
  // Columns [column, column + N * W), or those up to d_v if that is less than a vector.
  template <int R, int N, bool PART>
  __attribute__((always_inline)) void accumulate_columns(const Rows<Row, kBlock>& rows, int64_t row, int64_t column) {
    F c[R][N];
    float* o = into_.o + row * into_.stride + column;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int i = 0; i < N; i++) c[r][i] = Isa::load(o + r * into_.stride + i * W) * Isa::set1(rescale_[row + r]);
    const float* weights = scores_ + row * kBlock;
    for (int t = 0; t < rows.n; t++) {
      const T* value = rows.kv[t] + column;
      F v[N];
#pragma GCC unroll 2
      for (int i = 0; i < N; i++) v[i] = PART ? load_part(value, call_.d_v - column) : Isa::load(value + i * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int i = 0; i < N; i++) c[r][i] = Isa::fma(v[i], Isa::set1(weights[r * kBlock + t]), c[r][i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int i = 0; i < N; i++) Isa::store(o + r * into_.stride + i * W, c[r][i]);
  }

  const FlashmlaDecode& call_;
  const Item& item_;
  const Accumulator into_;
  const int64_t head_part_;  // elements of the key in the first tensor
  int64_t query_stride_;
  ScratchBytes bytes_{};
  T* decoded_;  // the block's rows, where they are not read in place
  float *queries_, *all_scores_, *rescale_;
  float* scores_ = nullptr;  // of the block: level 1 keeps those of all blocks
};

}  // namespace flashmla::FLASHMLA_ISA
