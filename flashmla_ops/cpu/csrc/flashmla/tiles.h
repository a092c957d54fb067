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

// Units of a staged row that lie together: a chunk of every row of a block, then the next chunk. 96 units x 12 rows of
// the broadcast operand (4.6 KB) and 96 x 32 of the vector operand (12 KB) stay in L1 together, and 576 / 96 leaves no
// rest.
constexpr int kChunk = 96;

template <class Instructions, class T>
struct Mac {
  using Isa = Instructions;
  static constexpr bool pairs = Isa::pairs && std::is_same_v<T, bf16>;
  using Unit = std::conditional_t<pairs, uint32_t, float>;
  using V = std::conditional_t<pairs, typename Isa::U, typename Isa::F>;
  using F = typename Isa::F;

  static F mac(F c, V vector, Unit broadcast) {
    if constexpr (pairs) {
      return Isa::dot(c, vector, Isa::set1(broadcast));
    } else {
      return Isa::fma(vector, Isa::set1(broadcast), c);
    }
  }
};

// scores[m][n] (+)= sum over k < units of keys[m][k] * queries[k][n]
template <class Mac, int M, int N>
inline __attribute__((always_inline)) void score_tile(const typename Mac::Unit* keys,     // [M, kChunk]
                                                      const typename Mac::Unit* queries,  // [units, N * W]
                                                      float* scores,                      // [M, N * W]
                                                      int units, bool first) {
  using Isa = typename Mac::Isa;
  using F = typename Isa::F;
  constexpr int W = Isa::W;
  F c[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) c[m][n] = first ? F{} : Isa::load(scores + (m * N + n) * W);
  for (int k = 0; k < units; k++) {
    typename Mac::V q[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) q[n] = Isa::load(queries + (k * N + n) * W);
#pragma GCC unroll 32
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) c[m][n] = Mac::mac(c[m][n], q[n], keys[m * kChunk + k]);
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) Isa::store(scores + (m * N + n) * W, c[m][n]);
}

// o[m][n] = o[m][n] * rescale[m] + sum over t < units of weights[t][m] * values[t][n]; o counts as 0 where `first`.
template <class Mac, int M, int N>
inline __attribute__((always_inline)) void value_tile(const typename Mac::Unit* weights,  // [units, weights_stride]
                                                      int64_t weights_stride,
                                                      const typename Mac::Unit* values,  // [units, kChunk]
                                                      float* o, int64_t o_stride, const float* rescale, int units,
                                                      bool first) {
  using Isa = typename Mac::Isa;
  using F = typename Isa::F;
  constexpr int W = Isa::W;
  F c[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    const F factor = Isa::set1(rescale[m]);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) c[m][n] = first ? F{} : Isa::load(o + m * o_stride + n * W) * factor;
  }
  for (int t = 0; t < units; t++) {
    typename Mac::V v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) v[n] = Isa::load(values + t * kChunk + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) c[m][n] = Mac::mac(c[m][n], v[n], weights[t * weights_stride + m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) Isa::store(o + m * o_stride + n * W, c[m][n]);
}

}  // namespace flashmla::FLASHMLA_ISA
