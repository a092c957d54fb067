// Rows of a, in the type they are multiplied in.
#pragma once

#include <type_traits>

#include "flashmla/dtypes.h"
#include "flashmla/scratch.h"

namespace flashmla::FLASHMLA_ISA {

// Calls f(rows), at most R, with a constant.
template <int R, class Call>
void with_rows(int64_t rows, Call f) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, f);
  }
  f(std::integral_constant<int, R>{});
}

// PAIRS: bf16, of which the processor multiplies two at a time; else float.
template <class Isa, bool PAIRS>
struct GemmRows {
  using Packed = std::conditional_t<PAIRS, bf16, float>;

  // A vector more than k needs: rows of a, at multiples of 4 KB, would all fall into the same set of L1.
  static int64_t stride(int64_t k) { return round_up(k, 2 * Isa::W) + 2 * Isa::W; }

  static int64_t bytes(int64_t rows, int64_t k) { return rows * stride(k) * int64_t{sizeof(Packed)}; }

  // Rows [row, row + rows) of a, padded with zeros.
  template <class A>
  static void pack(const FlashmlaGemm& call, int64_t row, int64_t rows, char* memory) {
    Packed* to = reinterpret_cast<Packed*>(memory);
    for (int64_t m = 0; m < rows; m++, to += stride(call.k)) {
      const A* from = static_cast<const A*>(call.a) + (row + m) * call.a_stride;
      int64_t i = 0;
      if constexpr (PAIRS) {
        std::memcpy(to, from, size_t(call.k) * sizeof(A)), i = call.k;
      } else {
        for (; i + Isa::W <= call.k; i += Isa::W) Isa::store(to + i, Isa::load(from + i));
        for (; i < call.k; i++) to[i] = to_float(from[i]);
      }
      for (; i < stride(call.k); i++) to[i] = Packed{};
    }
  }
};

}  // namespace flashmla::FLASHMLA_ISA
