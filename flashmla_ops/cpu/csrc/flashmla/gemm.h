// Products with few rows: what is left of a decode step once attention is fast. Every weight is read once from DRAM, so
// the work is divided by weight rows; a few of them at a time, each read along itself, meet rows of a in registers.
#pragma once

#include "flashmla/gemm_epilogue.h"
#include "flashmla/gemm_rows.h"

namespace flashmla::FLASHMLA_ISA {

constexpr int64_t kGemmNear = 32 << 10;   // bytes of a that weights meet at a time, so that they stay near the core
constexpr int64_t kPage = 4096;           // bytes; prefetchers of a processor stop at its end
constexpr int64_t kGemmAhead = 16 << 10;  // bytes of weights between what is multiplied and what is fetched, at least

// PAIRS: a in bf16, weights in bf16 or int8 (whose values bf16 holds exactly) and a processor that multiplies pairs, so
// that a stays as it is.
template <class Isa, class W, bool PAIRS>
class Gemm {
public:
  using Rows = GemmRows<Isa, PAIRS>;
  static constexpr int64_t kRows = 32;  // rows of a that one pass over the weights serves

private:
  using F = typename Isa::F;
  static constexpr bool pairs = PAIRS;
  using Packed = typename Rows::Packed;
  static constexpr int kStep = pairs ? 2 * Isa::W : Isa::W;  // elements of k in a vector
  static constexpr int kLine = 64 / sizeof(W);               // and in a cache line of weights
  static constexpr int kVectors = kLine / kStep;

public:
  // after: the weights that are read when these have been, if they do not follow in memory.
  explicit Gemm(const FlashmlaGemm& call, const W* after = nullptr) : call_(call), after_(after) {}

  // Columns [begin, end) of out, for rows [row, row + rows).
  void run(int64_t row, int64_t rows, const char* packed, int64_t begin, int64_t end) const {
    const bool gated = call_.activation == FLASHMLA_SILU_MUL;
    const Epilogue<Isa> epilogue(call_);
    float sums[2][kRows * kGemmColumns];
    for (int64_t n = begin; n < end; n += kGemmColumns) {
      const int64_t columns = end - n < kGemmColumns ? end - n : kGemmColumns;
      multiply(reinterpret_cast<const Packed*>(packed), rows, n, columns, sums[0]);
      if (gated) multiply(reinterpret_cast<const Packed*>(packed), rows, call_.n + n, columns, sums[1]);
      for (int64_t m = 0; m < rows; m++) {
        epilogue.finish(row + m, n, columns, sums[0] + m * kGemmColumns, sums[1] + m * kGemmColumns);
      }
    }
  }

private:
  // A chunk of k of `columns` weight rows; the following one begins at `next`.
  struct Strip {
    const W *weight, *next;
    int64_t columns, depth;
    bool first;
  };
  // Lines of weights to fetch into L2: of the tile that is `tiles` ahead, those whose number, modulo mask + 1, is
  // `turn` (none if that is larger). Where whole rows follow one another the processor fetches the neighbours of every
  // other line; fetching all takes up the few buffers for lines on their way that reads from L2 need too. Of parts of
  // rows, which lie apart, it does not: there fetching all is faster by a tenth.
  struct Fetch {
    int64_t tiles, mask, turn;
  };

  // sums [rows, kGemmColumns] = packed rows x weight rows [n, n + columns).
  void multiply(const Packed* a, int64_t rows, int64_t n, int64_t columns, float* sums) const {
    alignas(64) float partial[kRows * kGemmColumns * Isa::W];  // a vector for each sum
    const bool grouped = rows > Isa::gemm_m;
    const int64_t depth = depth_of(grouped ? Isa::gemm_group : rows);
    const W* weight = static_cast<const W*>(call_.weight) + n * call_.weight_stride;
    int64_t k = 0;
    do {  // once with a k of 0 too
      const bool last = k + depth >= call_.k;
      const W* following = after_ && n + columns == call_.n ? after_ : weight + columns * call_.weight_stride;
      const W* next = last ? following : weight + k + depth;
      const Strip strip{weight + k, next, columns, last ? call_.k - k : depth, k == 0};
      if (grouped) {
        run_groups(strip, rows, a + k, partial);
      } else {
        with_rows<Isa::gemm_m>(rows, [&](auto M) {
          constexpr int R = weight_rows(M());
          const int64_t ahead = kGemmAhead / (R * depth * int64_t{sizeof(W)});
          const Fetch fetch{ahead > 1 ? ahead : 1, depth < call_.k ? 0 : 1, 0};
          run_tiles<R, M()>(strip, 0, columns / R, fetch, a + k, partial);
        });
      }
      k += depth;
    } while (k < call_.k);
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t j = 0; j < columns; j += Isa::W) {
        float* vectors = partial + (m * kGemmColumns + j) * Isa::W;
        for (int64_t i = columns - j; i < Isa::W; i++) Isa::store(vectors + i * Isa::W, F{});
        Isa::store(sums + m * kGemmColumns + j, Isa::sums(vectors));
      }
    }
  }

  // Elements of k that are multiplied at a time, so that a group of rows of a stays near: all, or even parts.
  int64_t depth_of(int64_t rows) const {
    const int64_t most = kGemmNear / (rows * int64_t{sizeof(Packed)});
    const int64_t chunks = (call_.k + most - 1) / most;
    return chunks < 2 ? round_up(call_.k + 1, kLine) : round_up((call_.k + chunks - 1) / chunks, kLine * kVectors);
  }

  // Weight rows that M rows of a meet at once: as many as there are accumulators for.
  static constexpr int weight_rows(int m) {
    const int most = Isa::gemm_sums / m;
    return most >= 8 ? 8 : most >= 6 ? 6 : most >= 4 ? 4 : most;
  }

  // More rows of a than meet weights at once: groups of rows, as even as can be, meet a few weight rows in turns. The
  // first two share the fetching, so that DRAM is busy while both multiply. Measured on Zen 4 against one group of 8
  // that meets three weight rows at a time, whose rows of a fill L1 alone: 8 rows take 7 to 16 % less time from DRAM.
  void run_groups(const Strip& strip, int64_t rows, const Packed* a, float* partial) const {
    constexpr int R = weight_rows(Isa::gemm_group), kTiles = 2;
    const int64_t groups = (rows + Isa::gemm_group - 1) / Isa::gemm_group, tiles = strip.columns / R;
    int64_t begin = 0;
    do {  // with no tile too, for the weight rows that are left
      const int64_t end = tiles < begin + kTiles ? tiles : begin + kTiles;
      for (int64_t group = 0, m = 0; group < groups; group++) {
        const int64_t count = (rows - m + groups - group - 1) / (groups - group);
        with_rows<Isa::gemm_group>(count, [&](auto M) {
          const Fetch fetch = group < 2 ? Fetch{kTiles, 1, group} : Fetch{kTiles, 0, 1};
          run_tiles<R, M()>(strip, begin, end, fetch, a + m * Rows::stride(call_.k),
                            partial + m * kGemmColumns * Isa::W);
        });
        m += count;
      }
      begin += kTiles;
    } while (begin < tiles);
  }

  // Tiles [begin, end) of a strip's columns / R, and after the last the weight rows that are left; M rows of a.
  template <int R, int M>
  void run_tiles(const Strip& strip, int64_t begin, int64_t end, const Fetch& fetch, const Packed* a,
                 float* partial) const {
    const int64_t tiles = strip.columns / R, stride = call_.weight_stride;
    // A tile's rows are neighbours, or, if a page holds more than one, as far apart as can be: DRAM is read faster
    // where several pages are under way. Measured on Zen 4 with rows of 1 KB: 27 to 45 % less time.
    const bool neighbours = stride * int64_t{sizeof(W)} > kPage;
    const int64_t apart = neighbours ? 1 : tiles, step = neighbours ? R : 1;
    for (int64_t t = begin; t < end; t++) {
      const int64_t ahead = t + fetch.tiles;
      const W* next =
          ahead < tiles ? strip.weight + ahead * step * stride : strip.next + (ahead - tiles) * step * stride;
      tile<R, M>(strip, t * step, apart, next, fetch, a, partial);
    }
    if (end < tiles) return;
    for (int64_t j = tiles * R; j < strip.columns; j++) {
      tile<1, M>(strip, j, 1, strip.next + j * stride, fetch, a, partial);
    }
  }

  // Weight rows first, first + apart, ... of a strip; `next`: the first of those to fetch.
  template <int R, int M>
  __attribute__((noinline)) void tile(const Strip& strip, int64_t first, int64_t apart, const W* next,
                                      const Fetch& fetch, const Packed* a, float* partial) const {
    F c[R][M];
    const auto for_sums = [&](auto f) __attribute__((always_inline)) {
      float* at = partial + first * Isa::W;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++, at += apart * Isa::W) {
        __asm__("" : "+r"(at));  // or gcc 12 computes all addresses at once, and spills them
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) f(c[r][m], at + m * kGemmColumns * Isa::W);
      }
    };
    for_sums([&](F& sum, const float* from) { sum = strip.first ? F{} : Isa::load(from); });
    const int64_t stride = Rows::stride(call_.k), w_stride = apart * call_.weight_stride, depth = strip.depth;
    const W* w = strip.weight + first * call_.weight_stride;
    int64_t i = 0;
    for (; i + kLine <= depth; i += kLine) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        if (((i / kLine + r) & fetch.mask) == fetch.turn) __builtin_prefetch(next + r * w_stride + i, 0, 2);
      }
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; u++) multiply_step<R, M>(c, w + i + u * kStep, w_stride, a + i + u * kStep, stride);
    }
    for (; i < depth; i += kStep) {
      W part[R * kStep] = {};
      const size_t bytes = size_t(depth - i < kStep ? depth - i : kStep) * sizeof(W);
      for (int r = 0; r < R; r++) std::memcpy(part + r * kStep, w + r * w_stride + i, bytes);
      multiply_step<R, M>(c, part, kStep, a + i, stride);
    }
    for_sums([](F sum, float* to) { Isa::store(to, sum); });
  }

  // One vector of k. The operand of which there are fewer stays in registers.
  template <int R, int M>
  static __attribute__((always_inline)) void multiply_step(F (&c)[R][M], const W* w, int64_t w_stride, const Packed* a,
                                                           int64_t a_stride) {
    if constexpr (R < M) {
      decltype(operand(w)) v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) v[r] = operand(w + r * w_stride);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const auto x = row(a + m * a_stride);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) c[r][m] = mac(c[r][m], v[r], x);
      }
    } else {
      decltype(row(a)) x[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) x[m] = row(a + m * a_stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const auto v = operand(w + r * w_stride);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) c[r][m] = mac(c[r][m], v, x[m]);
      }
    }
  }

  static auto operand(const W* w) {
    if constexpr (pairs) {
      return Isa::load_pairs(w);
    } else {
      return Isa::load(w);
    }
  }
  static auto row(const Packed* a) {
    if constexpr (pairs) {
      return Isa::load_pairs(a);
    } else {
      return Isa::load(a);
    }
  }
  template <class V>
  static F mac(F c, V w, V a) {
    if constexpr (pairs) {
      return Isa::dot(c, w, a);
    } else {
      return Isa::fma(w, a, c);
    }
  }

  const FlashmlaGemm& call_;
  const W* const after_;
};

}  // namespace flashmla::FLASHMLA_ISA
