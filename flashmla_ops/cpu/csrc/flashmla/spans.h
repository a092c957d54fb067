// Which keys a mask shows, where they are consecutive: what lets attention under a mask that is only known at run time
// read the visible rows and no others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace flashmla {

// The meaning of one element of a mask: `kSeen` leaves the score as it is, `kHidden` leaves nothing of the key's
// weight, and with anything else the mask is a bias. The least number of a type hides like -inf, unless no other key is
// seen; that of float16 does not, because scores get as large.
enum class Says { kSeen, kHidden, kBias };

struct BoolMask {
  using Element = uint8_t;
  static Says says(Element x) { return x ? Says::kSeen : Says::kHidden; }
  static bool is_infinite(Element x) { return !x; }
};

struct FloatMask {
  using Element = float;
  static constexpr float kLeast = -3.3895313892515355e38f;  // of bfloat16, above that of float32
  static Says says(Element x) { return x == 0 ? Says::kSeen : x <= kLeast ? Says::kHidden : Says::kBias; }
  static bool is_infinite(Element x) { return x == -INFINITY; }
};

template <uint16_t Infinity, uint16_t Least>
struct HalfMask {
  using Element = uint16_t;
  static Says says(Element x) {
    return (x & 0x7fff) == 0 ? Says::kSeen : x == Infinity || x == Least ? Says::kHidden : Says::kBias;
  }
  static bool is_infinite(Element x) { return x == Infinity; }
};
using Bf16Mask = HalfMask<0xff80, 0xff7f>;
using F16Mask = HalfMask<0xfc00, 0xfc00>;

// One row of a mask: n elements, `stride` apart.
template <class Mask>
struct MaskRow {
  using Element = typename Mask::Element;
  const Element* data;
  int64_t n, stride;

  // Whether all of [begin, end) say the same. No early exit, so that the loop becomes vectors.
  bool all(Says wanted, int64_t begin, int64_t end) const {
    bool other = false;
    if (stride == 1) {
      for (int64_t j = begin; j < end; j++) other |= Mask::says(data[j]) != wanted;
    } else {
      for (int64_t j = begin; j < end; j++) other |= Mask::says(data[j * stride]) != wanted;
    }
    return !other;
  }
  bool shows(int64_t begin, int64_t end) const {
    return all(Says::kHidden, 0, begin) && all(Says::kSeen, begin, end) && all(Says::kHidden, end, n);
  }
  // The first key from `begin` on that says `wanted`; n if none does.
  int64_t first(Says wanted, int64_t begin) const {
    while (begin < n && Mask::says(data[begin * stride]) != wanted) begin++;
    return begin;
  }
  bool all_infinite() const {
    for (int64_t j = 0; j < n; j++) {
      if (!Mask::is_infinite(data[j * stride])) return false;
    }
    return true;
  }
};

// The last query of a sequence sees the keys [begin, end); with `causal` each earlier one sees one key less. `exact` is
// whether the mask says just that, and every query sees a key.
struct Span {
  bool exact = false, causal = false;
  int64_t begin = 0, end = 0;
};

// The span of a sequence whose mask is [s_q, s_kv].
template <class Mask>
Span span_of(const typename Mask::Element* mask, int64_t s_q, int64_t s_kv, int64_t query_stride, int64_t key_stride) {
  const auto row = [&](int64_t i) { return MaskRow<Mask>{mask + i * query_stride, s_kv, key_stride}; };
  const MaskRow<Mask> first = row(0);
  Span span;
  span.begin = first.first(Says::kSeen, 0);
  const int64_t end = first.first(Says::kHidden, span.begin);
  if (span.begin == end || !first.shows(span.begin, end)) return span;
  span.end = end;
  if (s_q > 1 && query_stride != 0 && end < s_kv && Mask::says(row(1).data[end * key_stride]) == Says::kSeen) {
    span.causal = true;
    span.end = end + s_q - 1;
    if (span.end > s_kv) return span;
  }
  for (int64_t i = 1; i < s_q && query_stride != 0; i++) {
    if (!row(i).shows(span.begin, span.causal ? end + i : end)) return span;
  }
  span.exact = true;
  return span;
}

}  // namespace flashmla
