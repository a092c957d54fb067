// Gradients through attention, for an item's query rows and all tokens that they see.
//
// With s the scaled scores, lse their log-sum-exp and p = exp(s - lse), which no pass over other tokens is needed for:
//
//     dv = p^T dout     dp = dout v^T     ds = p * (dp - delta)     dq = scale ds k     dk = scale ds^T q
//
// where delta = sum(out * dout) - dlse of each query row: the gradient of a softmax, and of its log-sum-exp. A sink
// takes a part of each row's weights away, but lse does not know of it. With share, what is left of them,
//
//     dv = share p^T dout     ds = p * (share dp - delta)     delta = share sum(out * dout) - dlse
//
// and the gradient of the sink's logit is (share - 1) sum(out * dout), summed over its head's rows by the caller. Where
// scores are capped, s = softcap t with t = tanh(scaled score / softcap), and ds is multiplied by 1 - t^2.
//
// For each block of tokens there are five products, all of them over packed copies: keys and values are packed once per
// block, queries and dout once per item, each in both of the layouts in which products read them. Scores lie
// [token][row], a lane is a query row. Products over tokens or over query rows take p and ds as pairs of bf16 where the
// processor multiplies those. The gradients of a block's keys and values are added to the rows of the sequence, which
// the caller gives to one thread at a time.
#pragma once

#include <algorithm>

#include "flashmla/finish.h"
#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

// Where gradients of tokens' rows are added: row t is `stride` floats behind row t - 1. Null: they are not wanted.
struct GradientRows {
  float* rows;
  int64_t stride;
};

// out[i] = sum over parts of part[i]
template <class Isa, class T, class Part>
void write_sum(T* out, int64_t d, int64_t n_parts, Part part) {
  int64_t i = 0;
  for (; i + Isa::W <= d; i += Isa::W) {
    typename Isa::F sum{};
    for (int64_t p = 0; p < n_parts; p++) sum += Isa::load(part(p) + i);
    Isa::store(out + i, sum);
  }
  for (; i < d; i++) {
    float sum = 0;
    for (int64_t p = 0; p < n_parts; p++) sum += part(p)[i];
    from_float(sum, out[i]);
  }
}

// T is the type of queries and of native rows. Rows of bytes become elements of what is packed.
template <class Isa, class T>
class AttentionBackward {
  using M = Mac<Isa, T>;
  using Unit = typename M::Unit;
  using Element = std::conditional_t<M::pairs, T, float>;  // what packed rows hold
  using F = typename Isa::F;
  static constexpr int W = Isa::W, kPanel = Isa::qk_n * W, kBlock = Isa::block;
  static constexpr int kPerUnit = M::pairs ? 2 : 1;
  static constexpr int kWideTokens = Isa::qk_m, kNarrowTokens = 2 * Isa::qk_m;
  static constexpr int kRows = Isa::pv_m, kVectors = Isa::pv_n;  // of a tile of gradients
  static_assert(kBlock % kNarrowTokens == 0 && kBlock % kRows == 0 && kBlock % kExp == 0 && W % kRows == 0);

public:
  AttentionBackward(const FlashmlaDecode& call, const FlashmlaGradients& gradients, const Item& item,
                    const GradientRows& into, char* memory)
      : call_(call), gradients_(gradients), item_(item), into_(into), rows_(round_up(item.rows, W)) {
    Scratch scratch(memory);
    plan(scratch);
  }

  static int64_t scratch_bytes(const FlashmlaDecode& call, const Item& item) {
    return AttentionBackward(call, {}, item, {}, nullptr).bytes_;
  }

  // `more`: the scratch holds the item's queries and their gradients so far, from a call over tokens of another cache.
  bool run(int64_t begin, int64_t end, bool more) {
    if (!more) {
      pack_rows();
      if (gradients_.dq) std::memset(dq_, 0, size_t(rows_ * out_stride_) * sizeof(float));
    }
    if (!(call_.row_format ? add<QuantizedRow<Element>>(begin, end) : add<NativeRow<T>>(begin, end))) return false;
    if (gradients_.dq) write_queries();
    return true;
  }

private:
  template <class Row>
  bool add(int64_t begin, int64_t end) {
    const auto block = [&](Rows<Row, kBlock>& here, int64_t t, auto) { add_block(here, t); };
    typename Row::Element* decoded = nullptr;
    if constexpr (!Row::in_place) decoded = decoded_;
    return for_blocks<Row, kBlock>(call_, item_, begin, end, decoded, [](int n) { return n; }, block);
  }

  // Rows [n, d] in both layouts that products read: over their elements, and over the rows themselves.
  struct Packed {
    int64_t d, units, columns_stride;  // units of a row
    Unit* by_element;                  // of queries [panel][unit][row of the panel]; of tokens [token][row_stride]
    Unit* by_row;                      // [unit of rows][columns_stride]
    int64_t row_stride;
    Element* lines[kPerUnit];  // of queries: the rows of a unit, which are being packed
  };

  void plan(Scratch& scratch) {
    const int64_t longest = std::max(call_.d_qk, call_.d_v);
    out_stride_ = round_up(longest, W) + W;  // rows of 2048 bytes would all fall into the same few sets of L1
    for (const auto& [packed, d] : {std::pair{&queries_, call_.d_qk}, {&douts_, call_.d_v}}) {
      *packed = sizes(d);
      packed->by_element = scratch.take<Unit>(rows_ * packed->units);
      packed->by_row = scratch.take<Unit>(rows_ / kPerUnit * packed->columns_stride);
      for (Element*& row : packed->lines) row = scratch.take<Element>(round_up(d, 2 * W));
    }
    for (const auto& [packed, d] : {std::pair{&keys_, call_.d_qk}, {&values_, call_.d_v}}) {
      *packed = sizes(d);
      packed->by_element = scratch.take<Unit>(kBlock * packed->row_stride);
    }
    keys_.by_row = scratch.take<Unit>(kBlock / kPerUnit * keys_.columns_stride);
    scores_ = scratch.take<float>(rows_ * kBlock);
    dweights_ = scratch.take<float>(rows_ * kBlock);
    weights_ = scratch.take<Unit>(rows_ / kPerUnit * kBlock);
    dscores_ = scratch.take<Unit>(rows_ / kPerUnit * kBlock);
    dscores_by_row_ = M::pairs ? scratch.take<Unit>(rows_ * kBlock / 2) : dscores_;
    dq_ = scratch.take<float>(rows_ * out_stride_);
    block_ = scratch.take<float>(kBlock * out_stride_);
    for (float** row : {&lse_, &share_, &delta_, &visible_, &hidden_, &ones_}) *row = scratch.take<float>(rows_);
    decoded_ = scratch.take<Element>(call_.row_format ? kBlock * call_.kv.d : 0);  // last: no other cache's are here
    bytes_ = scratch.used();
  }
  static Packed sizes(int64_t d) {
    const int64_t units = (d + kPerUnit - 1) / kPerUnit;
    // Products over rows load whole vectors of columns, and packing whole vectors of a row.
    return {d, units, round_up(d, W) + W, nullptr, nullptr, round_up(units, 2 * W) + 2 * W, {}};
  }

  int64_t panel_width(int64_t row) const { return rows_ - row < kPanel ? rows_ - row : kPanel; }

  // Queries and dout, and of each row lse and delta. A row that sees nothing has weights 0, whatever it holds.
  void pack_rows() {
    for (int64_t r = 0; r < rows_; r++) {
      const bool real = r < item_.rows;
      const int64_t row = item_.row + r, token = row / group_size(call_);
      const int64_t head = item_.kv_head * group_size(call_) + row % group_size(call_);
      const auto read = [&](const float* tensor, const int64_t* stride) {
        return tensor[item_.sequence * stride[0] + head * stride[1] + token * stride[2]];
      };
      const float lse = real ? read(gradients_.lse, gradients_.lse_stride) : INFINITY;
      const bool sees = !std::isinf(lse);
      const auto address = [&](const void* tensor, const int64_t* stride) {
        return static_cast<const T*>(tensor) + item_.sequence * stride[0] + token * stride[1] + head * stride[2];
      };
      const T* q = sees ? address(call_.q, call_.q_stride) : nullptr;
      const T* dout = sees ? address(gradients_.dout, gradients_.dout_stride) : nullptr;
      pack_row(queries_, r, q, call_.q_stride[3]);
      pack_row(douts_, r, dout, gradients_.dout_stride[3]);
      const T* out = sees ? address(gradients_.out, gradients_.out_stride) : nullptr;
      const float sum = sees ? dot(out, gradients_.out_stride[3], dout, gradients_.dout_stride[3], call_.d_v) : 0;
      lse_[r] = sees ? lse * kLog2E : INFINITY;
      share_[r] = 1, ones_[r] = 1;
      if (call_.attn_sink && sees) share_[r] = 1 / (1 + std::exp(call_.attn_sink[head * call_.attn_sink_stride] - lse));
      delta_[r] = share_[r] * sum;
      if (sees && gradients_.dlse) delta_[r] -= read(gradients_.dlse, gradients_.dlse_stride);
      if (gradients_.dsink && real) {
        const int64_t* stride = gradients_.dsink_stride;
        float& dsink = gradients_.dsink[item_.sequence * stride[0] + head * stride[1] + token * stride[2]];
        dsink = sees ? (share_[r] - 1) * sum : 0;
      }
    }
  }
  // Row r in both layouts; null: zeros. In pairs, two rows meet in the second.
  void pack_row(const Packed& packed, int64_t r, const T* from, int64_t stride) {
    Element* line = packed.lines[r % kPerUnit];
    read_line(line, from, stride, packed.d);
    const int64_t first = r / kPanel * kPanel, width = panel_width(first);
    Unit* to = packed.by_element + first * packed.units + (r - first);
    for (int64_t u = 0; u < packed.units; u++) std::memcpy(to + u * width, line + u * kPerUnit, sizeof(Unit));
    if (r % kPerUnit == kPerUnit - 1) pack_by_row(packed, r / kPerUnit, packed.lines[0], line);
  }
  static void pack_by_row(const Packed& packed, int64_t unit, const Element* first, const Element* last) {
    Unit* to = packed.by_row + unit * packed.columns_stride;
    for (int64_t c = 0; c < packed.d; c += W) {
      if constexpr (M::pairs) {
        Isa::store(to + c, Isa::interleave(first + c, last + c));
      } else {
        Isa::store(to + c, Isa::load(first + c));
      }
    }
  }
  // d elements, and zeros up to a multiple of 2 W.
  template <class From>
  static void read_line(Element* to, const From* from, int64_t stride, int64_t d) {
    const int64_t whole = round_up(std::max<int64_t>(d, 1), 2 * W);
    int64_t i = 0;
    if (from == nullptr) d = 0;
    if constexpr (M::pairs) {
      if (stride == 1) std::memcpy(to, from, size_t(d) * sizeof(From)), i = d;
      for (; i < d; i++) std::memcpy(to + i, from + i * stride, sizeof(From));
    } else {
      for (; stride == 1 && i + W <= d; i += W) Isa::store(to + i, Isa::load(from + i));
      for (; i < d; i++) to[i] = to_float(from[i * stride]);
    }
    std::memset(static_cast<void*>(to + d), 0, size_t(whole - d) * sizeof(Element));
  }
  static float dot(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t d) {
    int64_t i = 0;
    F sums{};
    if (a_stride == 1 && b_stride == 1) {
      for (; i + W <= d; i += W) sums = Isa::fma(Isa::load(a + i), Isa::load(b + i), sums);
    }
    float sum = Isa::sum(sums);
    for (; i < d; i++) sum += to_float(a[i * a_stride]) * to_float(b[i * b_stride]);
    return sum;
  }

  template <class Row>
  void add_block(const Rows<Row, kBlock>& rows, int64_t first_token) {
    look(rows.n, first_token);
    const int64_t first_row = first_seeing();
    if (first_row == rows_) return;
    pack_tokens(rows);
    score(queries_, keys_, scores_, first_row);
    cap(first_row);
    score(douts_, values_, dweights_, first_row);
    weigh(first_row, rows.n);
    if (into_.rows) {
      gradients_of_tokens(weights_, douts_, rows.n, first_row);
      add_to_rows(rows.n, first_token, 0, 0, call_.d_v, 1);
      gradients_of_tokens(dscores_, queries_, rows.n, first_row);
      const int64_t in_kv = call_.kv.d - call_.qk_start;
      add_to_rows(rows.n, first_token, call_.qk_start, 0, in_kv, call_.softmax_scale);
      add_to_rows(rows.n, first_token, call_.kv.d, in_kv, call_.k.d, call_.softmax_scale);
    }
    if (gradients_.dq) gradients_of_queries(first_row);
  }

  // How many of the block's tokens come before the last one that a row sees, and before its first one: as many as of
  // the row before, or more.
  void look(int n, int64_t first_token) {
    const int64_t last_row = item_.row + item_.rows - 1;
    const auto in_block = [&](int64_t token) { return float(std::clamp<int64_t>(token - first_token, 0, n)); };
    if (visible(call_, item_, item_.row).end - first_token >= n &&
        visible(call_, item_, last_row).begin <= first_token) {
      std::fill(visible_, visible_ + rows_, float(n)), std::fill(hidden_, hidden_ + rows_, 0.0f);
      return;
    }
    for (int64_t r = 0; r < rows_; r++) {
      const Tokens sees = visible(call_, item_, std::min(item_.row + r, last_row));
      visible_[r] = in_block(sees.end), hidden_[r] = in_block(sees.begin);
    }
  }
  int seen(int64_t end) const { return int(visible_[end - 1]); }
  int unseen(int64_t begin) const { return int(hidden_[begin]) / kExp * kExp; }
  // The first row of the first panel that sees a token, or rows_.
  int64_t first_seeing() const {
    int64_t first = 0;
    while (first < rows_ && seen(first + panel_width(first)) == 0) first += panel_width(first);
    return first;
  }

  template <class Row>
  void pack_tokens(const Rows<Row, kBlock>& rows) {
    const int64_t in_kv = call_.kv.d - call_.qk_start, padded = round_up(rows.n, kNarrowTokens);
    for (int64_t t = 0; t < padded; t++) {
      const bool real = t < rows.n;
      Element* key = line(keys_, t);
      read_line(key, real ? rows.kv[t] + call_.qk_start : nullptr, 1, in_kv);
      if (call_.k.d) read_line(key + in_kv, real ? rows.k[t] : nullptr, 1, call_.k.d);
      read_line(line(values_, t), real ? rows.kv[t] : nullptr, 1, call_.d_v);
      if (t % kPerUnit == kPerUnit - 1) pack_by_row(keys_, t / kPerUnit, line(keys_, t + 1 - kPerUnit), key);
    }
  }
  static Element* line(const Packed& packed, int64_t t) {
    return reinterpret_cast<Element*>(packed.by_element + t * packed.row_stride);
  }

  // scores[token][row] = tokens queries^T, for the rows from `first_row` on.
  void score(const Packed& queries, const Packed& tokens, float* scores, int64_t first_row) {
    for (int64_t first = first_row; first < rows_; first += kPanel) {
      const int64_t width = panel_width(first), n = seen(first + width);
      for (int64_t unit = 0; unit < queries.units; unit += kChunk) {
        const int units = int(std::min<int64_t>(queries.units - unit, kChunk));
        const Unit* columns = queries.by_element + first * queries.units + unit * width;
        const auto tile = [&](auto m, auto vectors) {
          for (int64_t t = unseen(first) / m() * m(); t < n; t += m()) {
            const Cursor<Unit, m()> rows(tokens.by_element + t * tokens.row_stride + unit,
                                         tokens.row_stride * int64_t{sizeof(Unit)});
            float* to = scores + first * kBlock + t * width;
            score_tile<M, m(), vectors()>(rows, columns, to, units, unit == 0, [] {});
          }
        };
        if (width == kPanel) {
          tile(std::integral_constant<int, kWideTokens>{}, std::integral_constant<int, Isa::qk_n>{});
        } else {
          tile(std::integral_constant<int, kNarrowTokens>{}, std::integral_constant<int, 1>{});
        }
      }
    }
  }

  void cap(int64_t first_row) {
    for (int64_t first = first_row; first < rows_; first += kPanel) {
      const int64_t width = panel_width(first), begin = unseen(first), end = seen(first + width);
      if (begin >= end) continue;
      cap_scores<Isa>(call_, scores_ + first * kBlock + begin * width, (end - begin) * width, call_.softmax_scale);
    }
  }

  // From scores and dweights to weights and dscores, units of two rows or of one: [token][unit of rows]. And dscores in
  // units of two tokens: [unit of tokens][row].
  void weigh(int64_t first_row, int n) {
    const F scale = Isa::set1(score_scale(call_)), one = Isa::set1(1.0f), zeros[kExp] = {};
    for (int64_t r = first_row; r < rows_; r += W) {
      const int64_t first = r / kPanel * kPanel, width = panel_width(first), at = first * kBlock + (r - first);
      const F lse = Isa::load(lse_ + r), delta = F{} - Isa::load(delta_ + r), share = Isa::load(share_ + r);
      const F visible = Isa::load(visible_ + r), hidden = Isa::load(hidden_ + r);
      const int begin = unseen(r), end = seen(r + W);
      for (int t = 0; t < begin; t += kExp) store(t, r, zeros, zeros);
      for (int t = begin; t < end; t += kExp) {
        F p[kExp], ds[kExp];
#pragma GCC unroll 8
        for (int i = 0; i < kExp; i++) p[i] = Isa::fma(Isa::load(scores_ + at + (t + i) * width), scale, F{} - lse);
        exp2<Isa>(p);
#pragma GCC unroll 8
        for (int i = 0; i < kExp; i++) {
          ds[i] = p[i] * Isa::fma(Isa::load(dweights_ + at + (t + i) * width), share, delta);
          p[i] *= share;
        }
        if (call_.softcap > 0) {
          for (int i = 0; i < kExp; i++) {
            const F capped = Isa::load(scores_ + at + (t + i) * width);
            ds[i] *= one - capped * capped;
          }
        }
        if (t + kExp > visible_[r] || t < hidden_[r + W - 1]) {
          for (int i = 0; i < kExp; i++) {
            const F token = Isa::set1(float(t + i));
            p[i] = token < visible ? p[i] : F{}, ds[i] = token < visible ? ds[i] : F{};
            p[i] = token < hidden ? F{} : p[i], ds[i] = token < hidden ? F{} : ds[i];
          }
        }
        store(t, r, p, ds);
      }
      for (int t = std::max(begin, (end + kExp - 1) / kExp * kExp); t < n; t += kExp) store(t, r, zeros, zeros);
    }
  }
  __attribute__((always_inline)) void store(int t, int64_t r, const F (&p)[kExp], const F (&ds)[kExp]) {
    const int64_t stride = rows_ / kPerUnit;
#pragma GCC unroll 8
    for (int i = 0; i < kExp; i++) {
      if constexpr (M::pairs) {
        Isa::template pack_neighbours<1>(weights_ + (t + i) * stride + r / 2, p[i]);
        Isa::template pack_neighbours<1>(dscores_ + (t + i) * stride + r / 2, ds[i]);
        if (i % 2) Isa::store(dscores_by_row_ + (t + i) / 2 * rows_ + r, Isa::pack(ds[i - 1], ds[i]));
      } else {
        Isa::store(weights_ + (t + i) * stride + r, p[i]);
        Isa::store(dscores_ + (t + i) * stride + r, ds[i]);
      }
    }
  }

  // Calls f(column, vectors) for tiles of so many vectors that cover d columns.
  template <class Call>
  __attribute__((always_inline)) static void for_columns(int64_t d, Call f) {
    const int64_t vectors = (d + W - 1) / W;
    for (int64_t v = 0; v < vectors;) {
      const int64_t left = vectors - v;
      if (kVectors >= 3 && left >= 3 && left != 4) {
        f(v * W, std::integral_constant<int, kVectors>{}), v += kVectors;
      } else if (left >= 2) {
        f(v * W, std::integral_constant<int, 2>{}), v += 2;
      } else {
        f(v * W, std::integral_constant<int, 1>{}), v += 1;
      }
    }
  }

  // block_[token] = sum over query rows of weights[token][row] * queries[row].
  void gradients_of_tokens(const Unit* weights, const Packed& queries, int n, int64_t first_row) {
    const int64_t stride = rows_ / kPerUnit, first = first_row / kPerUnit;
    for_columns(queries.d, [&](int64_t column, auto vectors) {
      const Unit* columns = queries.by_row + first * queries.columns_stride + column;
      for (int64_t t = 0; t < n; t += kRows) {
        const Cursor<Unit, kRows> rows(weights + t * stride + first, stride * int64_t{sizeof(Unit)});
        product_tile<M, kRows, vectors()>(rows, columns, queries.columns_stride, block_ + t * out_stride_ + column,
                                          out_stride_, int(stride - first), true, [] {});
      }
    });
  }
  // dq_[row] += sum over the block's tokens of dscores[token][row] * keys[token].
  void gradients_of_queries(int64_t first_row) {
    for_columns(call_.d_qk, [&](int64_t column, auto vectors) {
      for (int64_t r = first_row; r < rows_; r += kRows) {
        const int first = unseen(r / W * W) / kPerUnit, units = (seen(r / W * W + W) + kPerUnit - 1) / kPerUnit - first;
        if (units <= 0) continue;
        const auto values = [&](int u, int i) __attribute__((always_inline)) {
          return Isa::load(keys_.by_row + (first + u) * keys_.columns_stride + column + i * W);
        };
        value_tile<M, kRows, vectors()>(dscores_by_row_ + first * rows_ + r, rows_, values,
                                        dq_ + r * out_stride_ + column, out_stride_, ones_ + r, units, false, [] {});
      }
    });
  }

  // Adds d columns of block_, from `from` on, to columns of the tokens' rows, times `factor`.
  void add_to_rows(int n, int64_t first_token, int64_t column, int64_t from, int64_t d, float factor) {
    for (int64_t t = 0; t < n; t++) {
      const int64_t token = first_token + t, row = item_.slots ? item_.slots[token] : token;
      float* to = into_.rows + row * into_.stride + column;
      const float* add = block_ + t * out_stride_ + from;
      int64_t c = 0;
      for (; c + W <= d; c += W) Isa::store(to + c, Isa::fma(Isa::load(add + c), Isa::set1(factor), Isa::load(to + c)));
      for (; c < d; c++) to[c] += add[c] * factor;
    }
  }

  void write_queries() const {
    for (int64_t r = 0; r < item_.rows; r++) {
      const int64_t row = item_.row + r, token = row / group_size(call_);
      const int64_t head = item_.kv_head * group_size(call_) + row % group_size(call_);
      const int64_t* stride = gradients_.dq_stride;
      T* to = static_cast<T*>(gradients_.dq) + item_.sequence * stride[0] + token * stride[1] + head * stride[2];
      combine<Isa>(to, call_.d_qk, 1, &call_.softmax_scale, [&](int64_t) { return dq_ + r * out_stride_; });
    }
  }

  const FlashmlaDecode& call_;
  const FlashmlaGradients& gradients_;
  const Item& item_;
  const GradientRows into_;
  const int64_t rows_;  // padded to whole vectors
  int64_t bytes_ = 0, out_stride_ = 0;
  Element* decoded_;  // rows of bytes as elements
  Packed queries_, douts_, keys_, values_;
  float *scores_, *dweights_;
  Unit *weights_, *dscores_, *dscores_by_row_;
  float *dq_, *block_;
  float *lse_, *share_, *delta_, *visible_, *hidden_, *ones_;  // of each query row
};

}  // namespace flashmla::FLASHMLA_ISA
