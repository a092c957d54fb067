// Products with weights in panels of 16 weight rows, transposed: [n / 16, k, 16]. Lanes are columns of out, and
// elements of a are broadcast, so that a weight is loaded once for all rows of a, nothing is added up across lanes, and
// any number of rows can be served. Measured on Zen 4 against weights that lie along k: eight rows take 6 to 8 % less
// time from cache, and 10 to 28 % less from DRAM, more where DRAM is fast.
#pragma once

#include "flashmla/gemm_epilogue.h"
#include "flashmla/gemm_rows.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

// The columns of out that products with panels compute at a time, and the work that follows each.
template <class Isa>
class PanelColumns {
public:
  static constexpr int64_t kRows = 128;            // rows of a that one pass over the weights serves
  static constexpr int kColumns = FLASHMLA_PANEL;  // of a panel
  static constexpr int kVectors = kColumns / Isa::W;
  static constexpr int kTileRows = Isa::panel_m;  // rows of a, at most, whose sums stay in registers

  // Panels that meet `rows` rows of a at once.
  static constexpr int panels(int rows) {
    const int most = Isa::qk_m * Isa::qk_n / (rows * kVectors), least = Isa::panel_n / kVectors;
    return most > 8 ? 8 : most > least ? most : least;
  }

  explicit PanelColumns(const FlashmlaGemm& call) : call_(call) {}

  // Columns [begin, end), multiples of 16: few(rows, panels, column, the column read next, sums) where the rows are
  // those of a tile, many(panels, ...) where they are more. The columns are those of out, or, past them, of the gates.
  template <class Few, class Many>
  void run(int64_t row, int64_t rows, int64_t begin, int64_t end, Few few, Many many) const {
    if (rows > kTileRows) return multiply<panels(kTileRows)>(row, rows, begin, end, many);
    with_rows<kTileRows>(rows, [&](auto R) {
      multiply<panels(R())>(row, rows, begin, end,
                            [&](auto N, int64_t n, int64_t next, float* sums) { few(R, N, n, next, sums); });
    });
  }

  // More rows than a tile has, in groups as even as can be: f(rows of a group, the first of them, the group).
  template <class F>
  static void in_groups(int64_t rows, F f) {
    const int64_t groups = groups_of(rows);
    for (int64_t group = 0, m = 0; group < groups; group++) {
      const int64_t count = (rows - m + groups - group - 1) / (groups - group);
      with_rows<kTileRows>(count, [&](auto R) { f(R, m, group); });
      m += count;
    }
  }
  static int64_t groups_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

private:
  // N panels at a time, then one by one.
  template <int N, class Multiply>
  void multiply(int64_t row, int64_t rows, int64_t begin, int64_t end, Multiply with) const {
    int64_t n = begin;
    for (; n + N * kColumns <= end; n += N * kColumns) finish<N>(row, rows, n, with);
    if constexpr (N > 1) {
      for (; n < end; n += kColumns) finish<1>(row, rows, n, with);
    }
  }
  template <int N, class Multiply>
  void finish(int64_t row, int64_t rows, int64_t n, Multiply multiply) const {
    alignas(64) float sums[2][kRows * panels(kTileRows) * kColumns];
    const std::integral_constant<int, N> count;
    const int64_t next = n + N * kColumns;
    if (call_.activation == FLASHMLA_SILU_MUL) {
      multiply(count, n, call_.n + n, sums[0]);
      multiply(count, call_.n + n, next, sums[1]);
    } else {
      multiply(count, n, next, sums[0]);
    }
    const Epilogue<Isa> epilogue(call_);
    for (int64_t m = 0; m < rows; m++) {
      const int64_t at = m * N * kColumns;
      epilogue.finish(row + m, n, N * kColumns, sums[0] + at, sums[1] + at);
    }
  }

  const FlashmlaGemm& call_;
};

// PAIRS: a in bf16, weights in bf16 or int8 and a processor that multiplies pairs, as in Gemm.
template <class Isa, class W, bool PAIRS>
class PanelGemm {
public:
  using Rows = GemmRows<Isa, PAIRS>;
  using Columns = PanelColumns<Isa>;
  static constexpr int64_t kRows = Columns::kRows;

private:
  using F = typename Isa::F;
  using Packed = typename Rows::Packed;
  using M = Mac<Isa, Packed>;
  using V = typename M::V;
  static constexpr int kColumns = Columns::kColumns, kVectors = Columns::kVectors;
  static constexpr int kPerUnit = PAIRS ? 2 : 1;     // elements of k that a lane takes at once
  static constexpr int kStep = kPerUnit * kColumns;  // weights of a panel that are multiplied at once
  static constexpr int kLine = 64 / (kStep * sizeof(W)) > 1 ? 64 / (kStep * sizeof(W)) : 1;  // units in a cache line
  static constexpr int64_t kChunk = 64 << 10;  // bytes of a panel that stay near for several tiles of rows

  // Weights of each of n panels between what meets `rows` rows and what is fetched, where no other rows follow: in all
  // panels 4 or 6 KB. Measured on Zen 4, from DRAM: 6 and 8 rows take 3 to 30 % longer with 4 KB, and no less time with
  // 8; 1 to 4 rows take up to 12 % longer with 8.
  static constexpr int64_t ahead(int rows, int n) {
    const int lines = (rows > 5 ? 96 : 64) / n;
    return lines * (64 / int64_t{sizeof(W)});
  }

public:
  explicit PanelGemm(const FlashmlaGemm& call) : call_(call) {}

  // Columns [begin, end) of out, multiples of 16, for rows [row, row + rows), at most kRows.
  void run(int64_t row, int64_t rows, const char* packed, int64_t begin, int64_t end) const {
    const Packed* a = reinterpret_cast<const Packed*>(packed);
    Columns(call_).run(
        row, rows, begin, end,
        [&](auto R, auto N, int64_t n, int64_t next, float* sums) {
          tile<R(), N()>(a, panel(n), call_.k, true, Fetch{ahead(R(), N()), panel(next), 1, 0}, sums);
        },
        [&](auto N, int64_t n, int64_t next, float* sums) {
          multiply_groups<N()>(a, rows, panel(n), panel(next), sums);
        });
  }

private:
  // Weights to fetch into L2 while a chunk is multiplied: those `ahead` weights ahead while they are in the chunk, then
  // those from `next` on. Of the lines of the latter, only those are fetched whose number modulo `shares`, a power of
  // two, is `turn`.
  struct Fetch {
    int64_t ahead;
    const W* next;
    int64_t shares, turn;
  };

  const W* panel(int64_t column) const { return static_cast<const W*>(call_.weight) + column * call_.k; }

  // More rows than a tile has: in groups, which meet a chunk of the panels in turns and share the
  // fetching of the next, so that DRAM is busy while they multiply.
  template <int N>
  void multiply_groups(const Packed* a, int64_t rows, const W* weight, const W* next, float* sums) const {
    constexpr int64_t kDepth = kChunk / (kColumns * int64_t{sizeof(W)});
    const int64_t shares = Columns::groups_of(rows) < 4 ? 2 : 4;
    for (int64_t k = 0; k < call_.k || k == 0; k += kDepth) {
      const bool last = k + kDepth >= call_.k;
      const W* w = weight + k * kColumns;
      const int64_t depth = last ? call_.k - k : kDepth;
      Columns::in_groups(rows, [&](auto R, int64_t m, int64_t group) {
        const Fetch fetch{0, last ? next : w + kDepth * kColumns, shares, group};
        tile<R(), N>(a + m * Rows::stride(call_.k) + k, w, depth, k == 0, fetch, sums + m * N * kColumns);
      });
    }
  }

  // sums [R, N panels] (+)= R rows of a x N panels, over `depth` elements of k.
  template <int R, int N>
  __attribute__((noinline)) void tile(const Packed* a, const W* weight, int64_t depth, bool first, const Fetch& fetch,
                                      float* sums) const {
    constexpr int kN = N * kVectors;
    const int64_t stride = call_.k * kColumns;  // between panels
    F c[R][kN];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int n = 0; n < kN; n++) c[r][n] = first ? F{} : Isa::load(sums + (r * kN + n) * Isa::W);
    Cursor<typename M::Unit, R> at(a, Rows::stride(call_.k) * int64_t{sizeof(Packed)});
    const auto step = [&](auto load) __attribute__((always_inline)) {
      V v[kN];
#pragma GCC unroll 16
      for (int n = 0; n < kN; n++) v[n] = load(n);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int n = 0; n < kN; n++) c[r][n] = M::template mac<kN == 1>(c[r][n], v[n], at.row(r));
      at.advance();
    };
    const W *w = weight, *const whole = weight + depth / kPerUnit * kStep;
    // First the part whose distant weights are in the chunk, then the rest.
    const W* stop = fetch.ahead > 0 && fetch.ahead < whole - weight ? whole - fetch.ahead : weight;
    int64_t distance = fetch.ahead, u = 0;
    const int64_t mask = fetch.shares * kLine - 1, turn = fetch.turn * kLine;
    for (;;) {
      for (; w < stop; w += kStep, u++) {
        if ((u & mask) == turn) {
#pragma GCC unroll 16
          for (int n = 0; n < N; n++) __builtin_prefetch(w + n * stride + distance, 0, 2);
        }
        step([&](int n) __attribute__((always_inline)) {
          const W* row = w + n / kVectors * stride + n % kVectors * Isa::W;
          return value(row, row + kColumns);
        });
      }
      if (w == whole) break;
      stop = whole, distance = fetch.next - w;
    }
    if (depth % kPerUnit != 0) {  // pairs, and an odd k
      static constexpr W kZeros[kColumns] = {};
      step([&](int n) { return value(w + n / kVectors * stride + n % kVectors * Isa::W, kZeros); });
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int n = 0; n < kN; n++) Isa::store(sums + (r * kN + n) * Isa::W, c[r][n]);
  }

  static V value(const W* one, const W* two) {
    if constexpr (PAIRS) {
      return Isa::interleave(one, two);
    } else {
      return Isa::load(one);
    }
  }

  const FlashmlaGemm& call_;
};

}  // namespace flashmla::FLASHMLA_ISA
