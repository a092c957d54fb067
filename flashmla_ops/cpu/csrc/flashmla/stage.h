// Staging: a block's rows, wherever and however they lie (pages of any size, two tensors, any element type), copied
// once into the layout that the tiles read: [chunk][token][kChunk] units. It costs one load and store a vector against
// as many multiply-accumulates as there are query rows, and it keeps page boundaries, strides and formats out of the
// tiles.
#pragma once

#include "flashmla/rows.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

template <class Isa, class T>
struct Stage {
  using Unit = typename Mac<Isa, T>::Unit;
  static constexpr bool pairs = Mac<Isa, T>::pairs;
  static constexpr int kPerUnit = pairs ? 2 : 1;  // elements of a key

  // Units of a key part of d elements: pairs are not shared between parts.
  static int64_t units(int64_t d) { return (d + kPerUnit - 1) / kPerUnit; }
  static int64_t key_units(const FlashmlaDecode& call) { return units(call.kv.d - call.qk_start) + units(call.k.d); }
  static int64_t chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

  // d elements from `row`, as units [begin, begin + units(d)) of token `token`.
  static void put(Unit* staged, int64_t capacity, int token, int64_t begin, const T* row, int64_t d) {
    for (int64_t done = 0; done < d;) {
      const int64_t unit = begin + done / kPerUnit, chunk = unit / kChunk, offset = unit - chunk * kChunk;
      const int64_t room = (kChunk - offset) * kPerUnit, count = d - done < room ? d - done : room;
      copy(staged + (chunk * capacity + token) * kChunk + offset, row + done, count);
      done += count;
    }
  }

  // Values of a block: a unit is one column of one token, or of two tokens in turn. n is rounded up with zeros.
  static void put_values(Unit* staged, int64_t capacity, const T* const* rows, int n, int64_t d_v) {
    if constexpr (pairs) {
      for (int t = 0; t < n; t += 2) {
        for (int64_t c = 0; c < d_v; c += kChunk) {
          Unit* to = staged + (c / kChunk * capacity + t / 2) * kChunk;
          pair_up(to, rows[t] + c, t + 1 < n ? rows[t + 1] + c : nullptr, d_v - c < kChunk ? d_v - c : kChunk);
        }
      }
    } else {
      for (int t = 0; t < n; t++) put(staged, capacity, t, 0, rows[t], d_v);
    }
  }

private:
  static void copy(float* to, const T* from, int64_t n) {
    int64_t i = 0;
    for (; i + Isa::W <= n; i += Isa::W) Isa::store(to + i, Isa::load(from + i));
    for (; i < n; i++) to[i] = to_float(from[i]);
  }
  static void copy(uint32_t* to, const T* from, int64_t n) {
    std::memcpy(to, from, size_t(n) * sizeof(T));
    if (n % 2) reinterpret_cast<T*>(to)[n] = T{};
  }
  // The pairs (first[i], second[i]); (first[i], 0) where there is no second row.
  static void pair_up(uint32_t* to, const T* first, const T* second, int64_t n) {
    static const T zeros[kChunk] = {};
    if (second == nullptr) second = zeros;
    int64_t i = 0;
    for (; i + Isa::W <= n; i += Isa::W) Isa::store(to + i, Isa::interleave(first + i, second + i));
    for (; i < n; i++) to[i] = uint32_t{first[i].bits} | uint32_t{second[i].bits} << 16;
  }
};

}  // namespace flashmla::FLASHMLA_ISA
