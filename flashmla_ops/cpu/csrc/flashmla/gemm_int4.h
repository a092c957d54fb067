// Products with weights of four bits, in panels [n / 16, k / 8, 16] of dwords, which hold eight elements of k of one
// column each. A group of k shares a scale: its sums are kept in registers, and multiplied when the group ends, so that
// weights are widened by a shift and a look-up, and no product is rounded but to float32.
#pragma once

#include <utility>

#include "flashmla/gemm_panels.h"

namespace flashmla::FLASHMLA_ISA {

// PAIRS: a in bf16 and a processor that multiplies pairs, as in PanelGemm.
template <class Isa, bool PAIRS>
class Int4Gemm {
public:
  using Rows = GemmRows<Isa, PAIRS>;
  using Columns = PanelColumns<Isa>;
  static constexpr int64_t kRows = Columns::kRows;

private:
  using F = typename Isa::F;
  using U = typename Isa::U;
  using Packed = typename Rows::Packed;
  using M = Mac<Isa, Packed>;
  static constexpr int kColumns = Columns::kColumns, kVectors = Columns::kVectors;
  static constexpr int kUnits = FLASHMLA_INT4S / (PAIRS ? 2 : 1);  // of a, that a dword of weights meets
  // Cache lines of weights, of all panels that are read at once, between what is multiplied and what is fetched.
  static constexpr int64_t kAhead = 64;

public:
  explicit Int4Gemm(const FlashmlaGemm& call)
      : call_(call), stride_(call.k / FLASHMLA_INT4S * kColumns), group_(stride_ / call.weight_groups) {}

  // Columns [begin, end) of out, multiples of 16, for rows [row, row + rows), at most kRows.
  void run(int64_t row, int64_t rows, const char* packed, int64_t begin, int64_t end) const {
    const Packed* a = reinterpret_cast<const Packed*>(packed);
    Columns(call_).run(
        row, rows, begin, end,
        [&](auto R, auto N, int64_t n, int64_t next, float* sums) { tile<R(), N()>(a, n, next, sums); },
        [&](auto N, int64_t n, int64_t next, float* sums) {
          Columns::in_groups(rows, [&](auto R, int64_t m, int64_t) {
            tile<R(), N()>(a + m * Rows::stride(call_.k), n, next, sums + m * N() * kColumns);
          });
        });
  }

private:
  const uint32_t* panel(int64_t column) const {
    return static_cast<const uint32_t*>(call_.weight) + column / kColumns * stride_;
  }

  // sums [R, N panels] = R rows of a x N panels.
  template <int R, int N>
  __attribute__((noinline)) void tile(const Packed* a, int64_t column, int64_t next, float* sums) const {
    constexpr int kN = N * kVectors;
    for (int i = 0; i < R * kN; i++) Isa::store(sums + i * Isa::W, F{});
    Cursor<typename M::Unit, R> at(a, Rows::stride(call_.k) * int64_t{sizeof(Packed)});
    const uint32_t *w = panel(column), *const end = w + stride_, *const following = panel(next);
    constexpr int64_t ahead = kAhead / N * kColumns;
    for (int64_t group = 0; group < call_.weight_groups; group++) {
      F c[R][kN] = {};
      for (const uint32_t* const stop = w + group_; w < stop; w += kColumns) {
        const uint32_t* far = w + ahead < end ? w + ahead : following + (w + ahead - end);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) __builtin_prefetch(far + n * stride_, 0, 2);
        multiply_dwords<R, kN>(c, w, at);
      }
      const int64_t scale = (column / kColumns * call_.weight_groups + group) * kColumns;
#pragma GCC unroll 16
      for (int n = 0; n < kN; n++) {
        const F factor = scale_at(scale + n / kVectors * call_.weight_groups * kColumns + n % kVectors * Isa::W);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          float* sum = sums + (r * kN + n) * Isa::W;
          Isa::store(sum, Isa::fma(c[r][n], factor, Isa::load(sum)));
        }
      }
    }
  }

  // One dword of every column: eight elements of k.
  template <int R, int kN>
  __attribute__((always_inline)) void multiply_dwords(F (&c)[R][kN], const uint32_t* w,
                                                      Cursor<typename M::Unit, R>& at) const {
    U x[kN];
#pragma GCC unroll 16
    for (int n = 0; n < kN; n++) x[n] = Isa::load(w + n / kVectors * stride_ + n % kVectors * Isa::W);
    const auto unit = [&](auto J) __attribute__((always_inline)) {
      typename M::V v[kN];
#pragma GCC unroll 16
      for (int n = 0; n < kN; n++) v[n] = widened<J()>(x[n]);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int n = 0; n < kN; n++) c[r][n] = M::template mac<kN == 1>(c[r][n], v[n], at.row(r));
      at.advance();
    };
    [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      (unit(std::integral_constant<int, J>{}), ...);
    }(std::make_integer_sequence<int, kUnits>{});
  }

  template <int J>
  static auto widened(U x) {
    if constexpr (PAIRS) {
      return Isa::template int4_pairs<J>(x);
    } else {
      return Isa::template int4<J>(x);
    }
  }
  F scale_at(int64_t i) const {
    if (call_.group_dtype == FLASHMLA_BF16) return Isa::load(static_cast<const bf16*>(call_.group_scale) + i);
    return Isa::load(static_cast<const float*>(call_.group_scale) + i);
  }

  const FlashmlaGemm& call_;
  const int64_t stride_, group_;  // dwords of a panel, and of a group in it
};

}  // namespace flashmla::FLASHMLA_ISA
