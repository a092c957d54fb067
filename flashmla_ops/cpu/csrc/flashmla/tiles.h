// The register tiles. Both are outer products over a shared dimension: scores over the elements of a key, outputs over
// the tokens of a block. One operand is a vector (lanes = query rows, or output columns), the other is broadcast.
//
// A Unit is what one multiply-accumulate of a lane takes: a float, or a dword holding two bf16 (the next two key
// elements, or two tokens' values of one column). The loops are the same for both.
#pragma once

#include <type_traits>

#include "flashmla/dtypes.h"
#include "flashmla/kernels.h"

namespace flashmla::FLASHMLA_ISA {

// Units of a row that a tile of several vectors of queries takes at a time, and that lie together where rows are
// staged: a chunk of every row of a block, then the next chunk. 96 units of 8 rows of the broadcast operand (3 KB) and
// of 32 of the vector operand (12 KB) stay in L1 together, and 576 / 96 leaves no rest.
constexpr int kChunk = 96;

template <class Instructions, class T>
struct Mac {
  using Isa = Instructions;
  static constexpr bool pairs = Isa::pairs && std::is_same_v<T, bf16>;
  using Unit = std::conditional_t<pairs, uint32_t, float>;
  using V = std::conditional_t<pairs, typename Isa::U, typename Isa::F>;
  using F = typename Isa::F;

  // ONCE: nothing else uses this broadcast, so that it can be a memory operand.
  template <bool ONCE>
  static F mac(F c, V vector, const Unit* broadcast) {
    if constexpr (!pairs) {
      return Isa::fma(vector, Isa::set1(*broadcast), c);
    } else if constexpr (ONCE) {
      return Isa::dot_at(c, vector, broadcast);
    } else {
      return Isa::dot(c, vector, Isa::set1(*broadcast));
    }
  }
};

// The rows of the broadcast operand, `stride` bytes apart, at a place that advances along them. Eight rows share a base
// register: x86 adds an index register times 1, 2, 4 or 8, so that three more strides reach all of them.
template <class Unit, int M>
class Cursor {
public:
  Cursor(const void* rows, int64_t stride) : strides_{stride, 3 * stride, 5 * stride, 7 * stride} {
    for (int i = 0; i < kBases; i++) bases_[i] = static_cast<const char*>(rows) + 8 * i * stride;
  }
  __attribute__((always_inline)) const Unit* row(int m) const {
    const char* base = bases_[m / 8];
    switch (m % 8) {
      case 0:
        return at(base);
      case 3:
        return at(base + strides_[1]);
      case 5:
        return at(base + strides_[2]);
      case 6:
        return at(base + 2 * strides_[1]);
      case 7:
        return at(base + strides_[3]);
      default:
        return at(base + m % 8 * strides_[0]);
    }
  }
  __attribute__((always_inline)) void advance() {
#pragma GCC unroll 4
    for (int i = 0; i < kBases; i++) bases_[i] += sizeof(Unit);
  }

private:
  static const Unit* at(const char* p) { return reinterpret_cast<const Unit*>(p); }
  static constexpr int kBases = (M + 7) / 8;
  const char* bases_[kBases];
  const int64_t strides_[4];
};

// Calls body(k) for all k < units, and each() before every Isa::step of them, or once if that is 0.
template <class Isa, class Each, class Body>
inline __attribute__((always_inline)) void stepped(int units, Each each, Body body) {
  if constexpr (Isa::step == 0) {
    each();
    for (int k = 0; k < units; k++) body(k);
  } else {
    for (int k = 0; k < units;) {
      each();
      for (const int stop = k + Isa::step < units ? k + Isa::step : units; k < stop; k++) body(k);
    }
  }
}

// out[m][n] (+)= sum over k < units of rows[m][k] * columns[k][n]; each(): see `stepped`. Strides count elements.
template <class Mac, int M, int N, class Each>
inline __attribute__((always_inline)) void
product_tile(Cursor<typename Mac::Unit, M> rows, const typename Mac::Unit* columns, int64_t columns_stride, float* out,
             int64_t out_stride, int units, bool first, Each each) {
  using Isa = typename Mac::Isa;
  using F = typename Isa::F;
  constexpr int W = Isa::W;
  F c[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) c[m][n] = first ? F{} : Isa::load(out + m * out_stride + n * W);
  stepped<Isa>(units, each, [&](int k) __attribute__((always_inline)) {
    typename Mac::V column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) column[n] = Isa::load(columns + k * columns_stride + n * W);
#pragma GCC unroll 32
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) c[m][n] = Mac::template mac<N == 1>(c[m][n], column[n], rows.row(m));
    rows.advance();
  });
#pragma GCC unroll 32
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) Isa::store(out + m * out_stride + n * W, c[m][n]);
}

// The scores of M keys with N vectors of queries, which lie packed.
template <class Mac, int M, int N, class Each>
inline __attribute__((always_inline)) void score_tile(Cursor<typename Mac::Unit, M> keys,
                                                      const typename Mac::Unit* queries,  // [units, N * W]
                                                      float* scores,                      // [M, N * W]
                                                      int units, bool first, Each each) {
  constexpr int kWidth = N * Mac::Isa::W;
  product_tile<Mac, M, N>(keys, queries, kWidth, scores, kWidth, units, first, each);
}

// o[m][n] = o[m][n] * rescale[m] + sum over t < units of weights[t][m] * values(t, n); o counts as 0 where `first`.
// values(t, n): vector n of the columns, of unit t. each(): see `stepped`.
template <class Mac, int M, int N, class Values, class Each>
inline __attribute__((always_inline)) void value_tile(const typename Mac::Unit* weights,  // [units, weights_stride]
                                                      int64_t weights_stride, Values values, float* o, int64_t o_stride,
                                                      const float* rescale, int units, bool first, Each each) {
  using Isa = typename Mac::Isa;
  using F = typename Isa::F;
  constexpr int W = Isa::W;
  F c[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    const F factor = Isa::set1(rescale[m]);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) c[m][n] = first ? F{} : Isa::load(o + m * o_stride + n * W) * factor;
  }
  stepped<Isa>(units, each, [&](int t) __attribute__((always_inline)) {
    typename Mac::V v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) v[n] = values(t, n);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) c[m][n] = Mac::template mac<N == 1>(c[m][n], v[n], weights + t * weights_stride + m);
  });
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) Isa::store(o + m * o_stride + n * W, c[m][n]);
}

}  // namespace flashmla::FLASHMLA_ISA
