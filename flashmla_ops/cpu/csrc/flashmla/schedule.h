// The decode schedule, as flashmla_ops/reference/schedule.py defines it: an int32 tensor that says where each part
// starts.
#pragma once

#include <algorithm>

#include "flashmla/interface.h"

namespace flashmla {

struct Schedule {
  static constexpr int64_t kUnit = 32;      // tokens: cuts fall on multiples of this
  static constexpr int64_t kMinUnits = 2;   // a part is not made shorter than this
  static constexpr int64_t kMaxRows = 128;  // query rows of an item
  static constexpr int64_t kRowStep = 16;
  static constexpr int64_t kHeader = 8;

  int64_t b, s_q, h_q, h_kv, num_parts, row_block;

  Schedule(int64_t b, int64_t s_q, int64_t h_q, int64_t h_kv, int64_t num_parts)
      : b(b), s_q(s_q), h_q(h_q), h_kv(h_kv), num_parts(num_parts) {
    const int64_t blocks = divide_up(num_parts, std::max<int64_t>(b * h_kv, 1));
    row_block = std::min(divide_up(divide_up(rows(), blocks), kRowStep) * kRowStep, kMaxRows);
  }

  static int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }
  int64_t rows() const { return s_q * (h_q / h_kv); }
  int64_t items_per_head() const { return row_block ? divide_up(rows(), row_block) : 0; }
  int64_t items_per_sequence() const { return h_kv * items_per_head(); }
  int64_t numel() const { return kHeader + b + 2 * (num_parts + 1); }
  const int32_t* lengths(const int32_t* schedule) const { return schedule + kHeader; }
  const int32_t* starts(const int32_t* schedule) const { return schedule + kHeader + b; }

  // `whole`: no sequence is cut, and parts hold whole items.
  void write(const int32_t* cache_seqlens, int64_t stride, int32_t* schedule, bool whole = false) const {
    const int64_t header[kHeader] = {b, s_q, h_q, h_kv, num_parts, row_block, 0, 0};
    for (int64_t i = 0; i < kHeader; i++) *schedule++ = int32_t(header[i]);
    int64_t total = 0;
    for (int64_t i = 0; i < b; i++) {
      *schedule++ = cache_seqlens[i * stride];
      total += units(cache_seqlens[i * stride]) * items_per_sequence();
    }
    int64_t sequence = 0, before = 0;  // `before`: units of the sequences that precede `sequence`
    for (int64_t part = 0; part <= num_parts; part++) {
      const int64_t cut = std::min(total, std::max(total * part / num_parts, part * kMinUnits));
      while (sequence < b && before + units(cache_seqlens[sequence * stride]) * items_per_sequence() <= cut) {
        before += units(cache_seqlens[sequence * stride]) * items_per_sequence();
        sequence++;
      }
      const int64_t each = sequence < b ? units(cache_seqlens[sequence * stride]) : 1;
      const int64_t item = (cut - before) / each;
      *schedule++ = int32_t(sequence * items_per_sequence() + item);
      *schedule++ = whole ? 0 : int32_t((cut - before - item * each) * kUnit);
    }
  }

private:
  static int64_t units(int64_t length) { return std::max<int64_t>(1, divide_up(length, kUnit)); }
};

}  // namespace flashmla
