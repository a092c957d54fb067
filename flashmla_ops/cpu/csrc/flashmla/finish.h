// From unnormalised parts to results: merge by LSE, divide, round to the output's type.
#pragma once

#include <cmath>

#include "flashmla/dtypes.h"
#include "flashmla/rows.h"
#include "flashmla/softmax.h"

namespace flashmla::FLASHMLA_ISA {

// out[i] = sum over parts of part[i] * factor[part]
template <class Isa, class T, class Part>
void combine(T* out, int64_t d, int64_t n_parts, const float* factors, Part part) {
  int64_t i = 0;
  for (; i + Isa::W <= d; i += Isa::W) {
    typename Isa::F sum{};
    for (int64_t p = 0; p < n_parts; p++) {
      if (factors[p] != 0) sum = Isa::fma(Isa::load(part(p) + i), Isa::set1(factors[p]), sum);
    }
    Isa::store(out + i, sum);
  }
  for (; i < d; i++) {
    float sum = 0;
    for (int64_t p = 0; p < n_parts; p++) {
      if (factors[p] != 0) sum += to_float(part(p)[i]) * factors[p];
    }
    from_float(sum, out[i]);
  }
}

template <class Isa, class T>
void finish_rows(const FlashmlaDecode& call, const Item& item, const Accumulator* parts, int64_t n_parts, int64_t begin,
                 int64_t end) {
  float factors[FLASHMLA_MAX_PARTS];
  for (int64_t r = begin; r < end; r++) {
    // A maximum drops NaN, a sum keeps it: a row that has met one is NaN, not empty.
    const auto maximum = [&](int64_t p) { return std::isnan(parts[p].l[r]) ? parts[p].l[r] : parts[p].m[r]; };
    float m = -INFINITY;
    for (int64_t p = 0; p < n_parts; p++) m = maximum(p) > m || std::isnan(maximum(p)) ? maximum(p) : m;
    float l = 0;
    for (int64_t p = 0; p < n_parts; p++) {
      factors[p] = maximum(p) == -INFINITY ? 0 : std::exp2(maximum(p) - m);
      l += factors[p] != 0 ? parts[p].l[r] * factors[p] : 0;
    }
    const bool empty = m == -INFINITY;
    const float lse = empty ? INFINITY : (m + std::log2(l)) * kLn2;

    const int64_t row = item.row + r, token = row / group_size(call);
    const int64_t head = item.kv_head * group_size(call) + row % group_size(call);
    float weight = empty ? 0 : 1 / l;
    if (call.attn_sink && !empty) weight /= 1 + std::exp(call.attn_sink[head * call.attn_sink_stride] - lse);
    for (int64_t p = 0; p < n_parts; p++) factors[p] *= weight;

    T* out = static_cast<T*>(call.out) + item.sequence * call.out_stride[0] + token * call.out_stride[1] +
             head * call.out_stride[2];
    combine<Isa>(out, call.d_v, n_parts, factors, [&](int64_t p) { return parts[p].o + r * parts[p].stride; });
    const int64_t at = item.sequence * call.lse_stride[0] + head * call.lse_stride[1] + token * call.lse_stride[2];
    call.lse[at] = lse;
    if (call.max_logits) call.max_logits[at] = m * kLn2;
  }
}

// States are results already: each is weighed by exp(lse - merged lse), and an infinite lse means no weight.
template <class Isa, class T>
void merge_rows(const FlashmlaMerge& call, int64_t begin, int64_t end) {
  float factors[FLASHMLA_MAX_PARTS];
  for (int64_t r = begin; r < end; r++) {
    const int64_t head = r % call.h_q, token = r / call.h_q % call.s_q, sequence = r / call.h_q / call.s_q;
    float m = -INFINITY;
    for (int64_t p = 0; p < call.parts; p++) {
      const int64_t* s = call.lse_strides + 3 * p;
      factors[p] = call.lses[p][sequence * s[0] + head * s[1] + token * s[2]];
      if (std::isinf(factors[p])) factors[p] = -INFINITY;
      m = factors[p] > m || std::isnan(factors[p]) ? factors[p] : m;
    }
    float l = 0;
    for (int64_t p = 0; p < call.parts; p++) {
      factors[p] = factors[p] == -INFINITY ? 0 : std::exp(factors[p] - m);
      l += factors[p];
    }
    const bool empty = m == -INFINITY;
    for (int64_t p = 0; p < call.parts; p++) factors[p] = empty ? 0 : factors[p] / l;
    T* out = static_cast<T*>(call.out) + r * call.d_v;
    bool packed = true;
    for (int64_t p = 0; p < call.parts; p++) packed &= call.out_strides[4 * p + 3] == 1;
    const auto part = [&](int64_t p) {
      const int64_t* s = call.out_strides + 4 * p;
      return static_cast<const T*>(call.outs[p]) + sequence * s[0] + token * s[1] + head * s[2];
    };
    if (packed) {
      combine<Isa>(out, call.d_v, call.parts, factors, part);
    } else {
      for (int64_t i = 0; i < call.d_v; i++) {
        combine<Isa>(out + i, 1, call.parts, factors,
                     [&](int64_t p) { return part(p) + i * call.out_strides[4 * p + 3]; });
      }
    }
    call.lse[(sequence * call.h_q + head) * call.s_q + token] = empty ? INFINITY : m + std::log(l);
  }
}

}  // namespace flashmla::FLASHMLA_ISA
