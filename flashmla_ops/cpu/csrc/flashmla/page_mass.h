// The softmax mass of pages, exact from their keys or estimated from "codes" (flashmla/summaries.h), for the query rows
// of one KV head. Codes are multiplied as 16-bit integers: a query's weights, q_i step_i, are rounded to multiples of
// (largest |q_i|) (largest step_i) / 32767, which moves a score by little beside what the codes leave open. That, and
// the rounding of everything in fp32, is added to the slack.
#pragma once

#include <cmath>
#include <limits>

#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/summaries.h"

namespace flashmla::FLASHMLA_ISA {

// Room for exp2, log and the rounding of a mass: absolute, and relative to the mass.
constexpr float kAbsoluteRoom = 0x1p-15f, kRelativeRoom = 0x1p-20f;

template <class Isa, class T>
class PageMass {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using U = typename Isa::U;
  static constexpr int W = Isa::W;
  using Pairs = typename VectorOf<uint64_t, W / 2>::type;
  using HalfU = typename VectorOf<uint32_t, W / 2>::type;
  static constexpr int64_t kLine = 64, kTokens = 4, kTokensAhead = 8;
  static constexpr int kRows = W == 16 ? 4 : 2;  // of a score tile, which is four vectors of tokens wide
  // Sums of a query row's weights, and rows of which they are added up at once.
  static constexpr int64_t kSums = 3, kWeighed = W / kSums;
  static constexpr float kNarrow = 1e-33f;

public:
  PageMass(const FlashmlaPageMass& call, const PageItem& item, char* memory) : call_(call), item_(item) {
    const FlashmlaKeys& keys = call.keys;
    d_ = call.d_qk, padded_ = round_up(d_, 16), group_ = call.h_q / keys.h_kv, rows_ = call.s_q * group_;
    tokens_ = round_up(keys.page_size, 16);
    error_ = float(d_ + 32) * 0x1p-24f;  // of a sum of d products, relative to the sum of their magnitudes
    Scratch scratch(memory);
    queries_ = scratch.take<float>(rows_ * padded_), scaled_ = scratch.take<float>(rows_ * padded_);
    norms_ = scratch.take<float>(rows_), most_ = scratch.take<float>(rows_);
    low_ = scratch.take<float>(padded_), step_ = scratch.take<float>(padded_);
    weights_ = scratch.take<uint32_t>(rows_ * padded_ / 2);
    about_ = scratch.take<About>(rows_);
    scores_ = scratch.take<float>((rows_ + 1) * (tokens_ + 4 * W));
    stride_ = tokens_ + 4 * W;
    keys_ = scratch.take<float>(kTokens * padded_), sums_ = scratch.take<float>((rows_ + 1) * W * W);
    signs_ = scratch.take<uint64_t>(rows_ * 2);
    bytes_ = scratch.used();
  }

  static int64_t bytes(const FlashmlaPageMass& call) { return PageMass(call, {}, nullptr).bytes_; }

  void run() {
    pack_queries();
    const FlashmlaAlways& always = call_.always;
    const int64_t last = divided(item_.length - call_.s_q + 1) - always.local_pages;
    for (int64_t page = item_.begin; page < item_.end; page++) {
      if (page >= always.sink_pages && page < last) {
        // Pages lie anywhere, so that no processor fetches the next one by itself.
        ahead_ = page + 1 < std::min(item_.end, last) ? summary_of(page + 1) : nullptr;
        estimate(page, summary_of(page));
      } else {
        exact(page);
      }
    }
  }

private:
  // What a query row needs to know of a page's codes beside its weights.
  struct About {
    float centre, unit, slack;
  };
  // A page's codes: the radius of its keys, its largest step, its largest element, and whether all steps are nothing.
  struct Box {
    float radius, step, furthest;
    bool narrow;
  };

  int64_t divided(int64_t length) const { return (length + call_.keys.page_size - 1) / call_.keys.page_size; }
  int64_t number(int64_t page) const {
    return call_.block_table[item_.sequence * call_.block_table_stride[0] + page * call_.block_table_stride[1]];
  }
  const char* summary_of(int64_t page) const {
    return call_.summaries.data + number(page) * call_.summaries.page_stride +
           item_.kv_head * call_.summaries.head_stride;
  }
  int64_t at(int64_t row, int64_t page) const {
    const int64_t head = item_.kv_head * group_ + row % group_;
    return ((item_.sequence * call_.h_q + head) * call_.s_q + row / group_) * call_.max_pages + page;
  }
  void put(int64_t row, int64_t page, float mass, float slack) {
    call_.mass[at(row, page)] = mass;
    call_.slack[at(row, page)] = slack + kAbsoluteRoom + kRelativeRoom * (std::isinf(mass) ? 0 : std::fabs(mass));
  }

  void pack_queries() {
    for (int64_t r = 0; r < rows_; r++) {
      const T* q = static_cast<const T*>(call_.q) + item_.sequence * call_.q_stride[0] +
                   r / group_ * call_.q_stride[1] + (item_.kv_head * group_ + r % group_) * call_.q_stride[2];
      float* to = queries_ + r * padded_;
      float squares = 0, most = 0;
      for (int64_t i = 0; i < padded_; i++)
        to[i] = i < d_ ? to_float(q[i * call_.q_stride[3]]) * call_.softmax_scale : 0;
      for (int64_t i = 0; i < d_; i++) squares += to[i] * to[i], most = std::max(most, std::fabs(to[i]));
      norms_[r] = std::sqrt(squares) * (1 + error_), most_[r] = most;
      for (int64_t i = 0; i < padded_; i++) scaled_[r * padded_ + i] = most > 0 ? to[i] / most : 0;
    }
  }

  // The logarithm of the sum of the exponentials of n scores.
  static float log_sum(float* scores, int64_t n) {
    F top = Isa::set1(-INFINITY);
    for (int64_t t = n; t < round_up(n, 4 * W); t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t < n; t += W) top = Isa::max(top, Isa::load(scores + t));
    const float most = Isa::max(top);
    if (std::isinf(most)) return most;
    F total{};
    const F shift = Isa::set1(-most * kLog2E), log2e = Isa::set1(kLog2E);
    for (int64_t t = 0; t < n; t += 4 * W) {
      F p[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) p[i] = Isa::fma(Isa::load(scores + t + i * W), log2e, shift);
      exp2<Isa>(p);
      total += (p[0] + p[1]) + (p[2] + p[3]);
    }
    return most + std::log(Isa::sum(total));
  }

  void estimate(int64_t page, const char* summary) {
    switch (call_.summaries.kind) {
      case SUMMARY_CODES:
        return estimate_codes(page, summary);
      case SUMMARY_BOXES:
        return estimate_boxes(page, summary);
      case SUMMARY_SPREAD:
        return estimate_spread(page, summary);
      default:
        return estimate_signs(page, summary);
    }
  }

  // bfloat16 numbers as floats, padded with zeros.
  void unpack(const char* from, float* to) const {
    for (int64_t i = 0; i < d_; i++) {
      uint16_t bits;
      std::memcpy(&bits, from + 2 * i, 2);
      to[i] = float_of(uint32_t{bits} << 16);
    }
    for (int64_t i = d_; i < padded_; i++) to[i] = 0;
  }

  void estimate_codes(int64_t page, const char* summary) {
    const CodesLayout layout(call_.keys.page_size, d_);
    std::memcpy(&box_.radius, summary, 4);
    unpack(summary + kCodesHeader, low_);
    unpack(summary + layout.step(), step_);
    frame();
    for (int64_t r = 0; r < rows_; r += kWeighed) weigh(r, std::min(kWeighed, rows_ - r));
    const char* words = summary + layout.words();
    const int64_t before = words - summary;
    for (int64_t i = 0; ahead_ && i < before; i += kLine) __builtin_prefetch(ahead_ + i, 0, 3);
    if (ahead_) ahead_ += before;
    for (int64_t t = 0; t < tokens_; t += 4 * W) {
      const bool wide = t + 4 * W <= tokens_;
      int64_t r = 0;
      for (; r + kRows <= rows_; r += kRows) wide ? score<kRows, 4>(words, t, r) : score_rest<kRows>(words, t, r);
      if constexpr (kRows == 4) {
        if (r + 3 <= rows_) wide ? score<3, 4>(words, t, r) : score_rest<3>(words, t, r), r += 3;
        if (r + 2 <= rows_) wide ? score<2, 4>(words, t, r) : score_rest<2>(words, t, r), r += 2;
      }
      if (r < rows_) wide ? score<1, 4>(words, t, r) : score_rest<1>(words, t, r);
    }
    for (int64_t r = 0; r < rows_; r++)
      put(r, page, log_sum(scores_ + r * stride_, call_.keys.page_size), about_[r].slack);
  }

  // The middle of a page's box, in low_, and its steps as multiples of a 32767th of the largest, in step_.
  void frame() {
    F widest{}, furthest{};
    for (int64_t i = 0; i < padded_; i += W) {
      const F low = Isa::load(low_ + i), step = Isa::load(step_ + i);
      widest = Isa::max(step, widest);
      furthest = Isa::max(Isa::fma(Isa::set1(16.0f), step, magnitude(low)), furthest);
      Isa::store(low_ + i, Isa::fma(Isa::set1(8.0f), step, low));
    }
    box_.step = Isa::max(widest), box_.furthest = Isa::max(furthest);
    box_.narrow = !(box_.step > kNarrow);  // all weights are 0
    const F inverse = Isa::set1(box_.narrow ? 0 : 32767 / box_.step);
    for (int64_t i = 0; i < padded_; i += W) Isa::store(step_ + i, Isa::load(step_ + i) * inverse);
  }

  // The weights of n query rows for the page in low_ and step_.
  void weigh(int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i++) round_weights(first + i, sums_ + i * kSums * W);
    float sums[W];
    Isa::store(sums, Isa::sums(sums_));
    const float rounding = float(padded_ / W + W + 8) * 0x1p-24f * box_.furthest * std::sqrt(float(d_));
    for (int64_t i = 0; i < n; i++) {
      const int64_t r = first + i;
      const float *of = sums + i * kSums, unit = most_[r] * box_.step / 32767;
      const float centre = of[0] * most_[r] - 7.5f * unit * of[1];
      // A weight is within half a unit of the number that stands for it, or is all that is left out.
      const float in_box = (0.5f * of[2] + (box_.narrow ? 8 * 32767.0f : 0.25f) * float(d_)) * unit * (1 + error_);
      const float open = std::min(in_box, norms_[r] * box_.radius);
      const float rounded = 3.75f * float(d_) * unit * 1.05f + norms_[r] * rounding;
      about_[r] = {centre, unit, box_.radius < INFINITY ? open + rounded : INFINITY};
    }
  }

  // A row's weights as pairs of whole numbers. To sums: its products with the middle, the weights, their magnitudes.
  void round_weights(int64_t r, float* sums) {
    const float* q = scaled_ + r * padded_;
    uint32_t* to = weights_ + r * padded_ / 2;
    const F magic = Isa::set1(0x1.8p23f);  // adding it rounds to whole numbers, in the low bits of the sum
    const I zero = Isa::template reinterpret<I>(magic);
    F centres{};
    I total{}, sizes{};
    for (int64_t i = 0; i < padded_; i += W) {
      const F x = Isa::load(q + i);
      const I whole = Isa::template reinterpret<I>(Isa::fma(x, Isa::load(step_ + i), magic)) - zero;
      centres = Isa::fma(x, Isa::load(low_ + i), centres);
      total += whole;
      sizes += whole < 0 ? -whole : whole;
      const Pairs two = Isa::template reinterpret<Pairs>(whole);
      const Pairs packed = (two & 0xffff) | (two >> 16 & 0xffff0000);
      const auto pairs = __builtin_convertvector(packed, HalfU);
      std::memcpy(to + i / 2, &pairs, sizeof pairs);
    }
    Isa::store(sums, centres);
    Isa::store(sums + W, __builtin_convertvector(total, F));
    Isa::store(sums + 2 * W, __builtin_convertvector(sizes, F));
  }

  static F magnitude(F x) { return Isa::max(x, F{} - x); }

  // Scores of R query rows and V vectors of tokens.
  template <int R, int V>
  void score(const char* words, int64_t t, int64_t r) {
    I sums[R][V];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {  // gcc fills an array that is set to {} by an instruction that takes forty cycles
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[i][v] = I{};
    }
    const char* ahead = r == 0 ? ahead_ : nullptr;
    const U low = Isa::set1(uint32_t{0x000f000f});
    for (int64_t j = 0; j < (d_ + 7) / 8; j++) {
      U eight[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) std::memcpy(&eight[v], words + (j * tokens_ + t + v * W) * 4, sizeof(U));
      if (ahead) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < V * int64_t(sizeof(U)); i += kLine)
          __builtin_prefetch(ahead + (j * tokens_ + t) * 4 + i, 0, 3);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        U codes[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) codes[v] = (eight[v] >> (4 * k)) & low;
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
          const U weight = Isa::set1(weights_[(r + i) * padded_ / 2 + j * 4 + k]);
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) sums[i][v] = Isa::dot(sums[i][v], codes[v], weight);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      const F unit = Isa::set1(about_[r + i].unit), centre = Isa::set1(about_[r + i].centre);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        Isa::store(scores_ + (r + i) * stride_ + t + v * W,
                   Isa::fma(__builtin_convertvector(sums[i][v], F), unit, centre));
      }
    }
  }
  template <int R>
  void score_rest(const char* words, int64_t t, int64_t r) {
    for (; t < tokens_; t += W) score<R, 1>(words, t, r);
  }

  void estimate_boxes(int64_t page, const char* summary) {
    unpack(summary, low_);
    unpack(summary + 2 * d_, step_);  // the high end, here
    for (int64_t r = 0; r < rows_; r++) {
      const float* q = queries_ + r * padded_;
      float best = 0, worst = 0, magnitudes = 0;
      for (int64_t i = 0; i < d_; i++) {
        const float a = q[i] * low_[i], b = q[i] * step_[i];
        best += a > b ? a : b, worst += a > b ? b : a;
        magnitudes += std::fabs(a) + std::fabs(b);
      }
      put(r, page, best + std::log(float(call_.keys.page_size)), best - worst + 2 * error_ * magnitudes);
    }
  }

  void estimate_spread(int64_t page, const char* summary) {
    unpack(summary, low_);
    unpack(summary + 2 * d_, step_);
    for (int64_t r = 0; r < rows_; r++) {
      const float* q = queries_ + r * padded_;
      float mean = 0, squares = 0;
      for (int64_t i = 0; i < d_; i++) {
        const float away = q[i] * step_[i];
        mean += q[i] * low_[i], squares += away * away;
      }
      put(r, page, mean + squares / 2 + std::log(float(call_.keys.page_size)), INFINITY);
    }
  }

  void estimate_signs(int64_t page, const char* summary) {
    if (page == item_.begin || !signed_) sign_queries();
    unpack(summary, low_);
    const int64_t n = call_.keys.page_size;
    const char *lengths = summary + 2 * d_, *signs = lengths + 2 * n;
    for (int64_t r = 0; r < rows_; r++) {
      const float* q = queries_ + r * padded_;
      float mean = 0;
      for (int64_t i = 0; i < d_; i++) mean += q[i] * low_[i];
      float* scores = scores_ + r * stride_;
      for (int64_t t = 0; t < n; t++) {
        uint64_t key[2];
        uint16_t length;
        std::memcpy(key, signs + t * kSignBytes, sizeof key);
        std::memcpy(&length, lengths + 2 * t, 2);
        const int apart =
            __builtin_popcountll(key[0] ^ signs_[2 * r]) + __builtin_popcountll(key[1] ^ signs_[2 * r + 1]);
        scores[t] = mean + norms_[r] * float_of(uint32_t{length} << 16) * cosines_[apart];
      }
      put(r, page, log_sum(scores, n), INFINITY);
    }
  }

  void sign_queries() {
    for (int64_t r = 0; r < rows_; r++) {
      signs_[2 * r] = signs_[2 * r + 1] = 0;
      for (int64_t k = 0; k < kPlanes; k++) {
        double side = 0;
        for (int64_t i = 0; i < d_; i++) {
          side += double(queries_[r * padded_ + i]) *
                  call_.summaries.planes[i * call_.summaries.planes_stride[0] + k * call_.summaries.planes_stride[1]];
        }
        if (side > 0) signs_[2 * r + k / 64] |= uint64_t{1} << k % 64;
      }
    }
    for (int64_t k = 0; k <= kPlanes; k++) {
      cosines_[k] = float(std::sin((1 - 2.0 * double(k) / double(kPlanes)) * 1.5707963267948966));
    }
    signed_ = true;
  }

  // From the keys of a page that is always attended to. The last row of sums is that of the keys' own squares.
  void exact(int64_t page) {
    const FlashmlaKeys& keys = call_.keys;
    const int64_t first = page * keys.page_size, n = std::min(keys.page_size, item_.length - first),
                  number = this->number(page);
    for (int64_t t = 0; t < n; t += W) {
      for (int64_t i = 0; i < std::min<int64_t>(W, n - t); i += kTokens) multiply(number, t, i, n);
      for (int64_t r = 0; r <= rows_; r++) Isa::store(scores_ + r * stride_ + t, Isa::sums(sums_ + r * W * W));
    }
    float square = 0;
    for (int64_t t = 0; t < n; t++)
      square = square < scores_[rows_ * stride_ + t] ? scores_[rows_ * stride_ + t] : square;
    for (int64_t r = 0; r < rows_; r++) {
      const int64_t seen = std::min(n, item_.length - call_.s_q + r / group_ + 1 - first);
      const float mass = seen > 0 ? log_sum(scores_ + r * stride_, seen) : -INFINITY;
      put(r, page, mass, error_ * norms_[r] * std::sqrt(square) * (1 + error_));
    }
  }

  // Products of kTokens keys of a page, from t + i on, with the query rows and with themselves: to sums, as vectors.
  void multiply(int64_t page, int64_t t, int64_t i, int64_t n) {
    for (int64_t k = 0; k < kTokens; k++) {
      // After the last one it is taken again: its products are not looked at.
      widen(page, std::min(t + i + k, n - 1), keys_ + k * padded_);
      if (t + i + k + kTokensAhead < n) fetch(page, t + i + k + kTokensAhead);
    }
    int64_t r = 0;
    for (; r + 2 <= rows_; r += 2) products<2>(r, i);
    if (r < rows_) products<1>(r, i);
    for (int64_t k = 0; k < kTokens; k++) {
      F square{};
      for (int64_t e = 0; e < padded_; e += W) {
        const F key = Isa::load(keys_ + k * padded_ + e);
        square = Isa::fma(key, key, square);
      }
      Isa::store(sums_ + (rows_ * W + i + k) * W, square);
    }
  }
  template <int R>
  void products(int64_t r, int64_t i) {
    F sums[R][kTokens];
#pragma GCC unroll 2
    for (int a = 0; a < R; a++) {
#pragma GCC unroll 4
      for (int k = 0; k < kTokens; k++) sums[a][k] = F{};
    }
    for (int64_t e = 0; e < padded_; e += W) {
      F keys[kTokens];
#pragma GCC unroll 4
      for (int k = 0; k < kTokens; k++) keys[k] = Isa::load(keys_ + k * padded_ + e);
#pragma GCC unroll 2
      for (int a = 0; a < R; a++) {
        const F q = Isa::load(queries_ + (r + a) * padded_ + e);
#pragma GCC unroll 4
        for (int k = 0; k < kTokens; k++) sums[a][k] = Isa::fma(q, keys[k], sums[a][k]);
      }
    }
#pragma GCC unroll 2
    for (int a = 0; a < R; a++) {
#pragma GCC unroll 4
      for (int k = 0; k < kTokens; k++) Isa::store(sums_ + ((r + a) * W + i + k) * W, sums[a][k]);
    }
  }

  const T* row(const FlashmlaCache& cache, int64_t page, int64_t token) const {
    return static_cast<const T*>(cache.data) + page * cache.page_stride + token * cache.token_stride +
           item_.kv_head * cache.head_stride;
  }
  void fetch(int64_t page, int64_t token) const {
    const FlashmlaKeys& keys = call_.keys;
    const auto* at = reinterpret_cast<const char*>(row(keys.kv, page, token) + keys.qk_start);
    for (int64_t i = 0; i < (keys.kv.d - keys.qk_start) * int64_t(sizeof(T)); i += kLine)
      __builtin_prefetch(at + i, 0, 3);
  }
  // The key of a token as floats, padded with zeros.
  void widen(int64_t page, int64_t token, float* to) const {
    const FlashmlaKeys& keys = call_.keys;
    const int64_t first = keys.kv.d - keys.qk_start;
    convert(row(keys.kv, page, token) + keys.qk_start, first, to);
    if (keys.k.d) convert(row(keys.k, page, token), keys.k.d, to + first);
    for (int64_t i = d_; i < padded_; i++) to[i] = 0;
  }
  static void convert(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) Isa::store(to + i, Isa::load(from + i));
    for (; i < n; i++) to[i] = to_float(from[i]);
  }

  const FlashmlaPageMass& call_;
  const PageItem& item_;
  int64_t d_, padded_, group_, rows_, tokens_, stride_, bytes_;
  float error_;
  float *queries_, *scaled_, *norms_, *most_, *low_, *step_, *scores_, *keys_, *sums_;
  Box box_{};
  uint32_t* weights_;
  About* about_;
  uint64_t* signs_;
  const char* ahead_ = nullptr;  // the summary of the next page, or null
  float cosines_[kPlanes + 1];
  bool signed_ = false;
};

}  // namespace flashmla::FLASHMLA_ISA
