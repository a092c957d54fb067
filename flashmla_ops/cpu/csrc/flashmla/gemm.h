// Products with few rows: what is left of a decode step once attention is fast. Every weight is read once from DRAM, so
// the work is divided by weight rows, each read along itself, and multiplied with all rows of a while it is in L1.
#pragma once

#include <cmath>

#include "flashmla/scratch.h"
#include "flashmla/softmax.h"
#include "flashmla/tiles.h"

namespace flashmla::FLASHMLA_ISA {

constexpr int kGemmRows = 32;     // rows of a that one pass over the weights serves
constexpr int kGemmColumns = 64;  // columns of out that one task finishes at a time
constexpr int kGemmDepth = 512;   // elements of k that stay in L1: four weight rows and the rows of a they meet

// PAIRS: a in bf16, weights in bf16 or int8 (whose values bf16 holds exactly) and a processor that multiplies pairs, so
// that a stays as it is.
template <class Isa, class W, bool PAIRS>
class Gemm {
  using F = typename Isa::F;
  static constexpr bool pairs = PAIRS;
  using Packed = std::conditional_t<pairs, bf16, float>;
  static constexpr int kStep = pairs ? 2 * Isa::W : Isa::W;  // elements of k in a vector

public:
  explicit Gemm(const FlashmlaGemm& call) : call_(call) {}

  // A vector more than k needs: rows of a, at multiples of 4 KB, would all fall into the same set of L1.
  static int64_t packed_stride(int64_t k) { return round_up(k, 2 * Isa::W) + 2 * Isa::W; }
  static int64_t packed_bytes(const FlashmlaGemm& call) {
    return kGemmRows * packed_stride(call.k) * int64_t{sizeof(Packed)};
  }

  // Rows [row, row + rows) of a in the type they are multiplied in, padded with zeros.
  template <class A>
  void pack(int64_t row, int64_t rows, char* memory) const {
    Packed* to = reinterpret_cast<Packed*>(memory);
    for (int64_t m = 0; m < rows; m++, to += packed_stride(call_.k)) {
      const A* from = static_cast<const A*>(call_.a) + (row + m) * call_.a_stride;
      int64_t i = 0;
      if constexpr (pairs) {
        std::memcpy(to, from, size_t(call_.k) * sizeof(A)), i = call_.k;
      } else {
        for (; i + Isa::W <= call_.k; i += Isa::W) Isa::store(to + i, Isa::load(from + i));
        for (; i < call_.k; i++) to[i] = to_float(from[i]);
      }
      for (; i < packed_stride(call_.k); i++) to[i] = Packed{};
    }
  }

  // Columns [begin, end) of out, for rows [row, row + rows).
  void run(int64_t row, int64_t rows, const char* packed, int64_t begin, int64_t end) const {
    const bool gated = call_.activation == FLASHMLA_SILU_MUL;
    float sums[2][kGemmRows * kGemmColumns];
    for (int64_t n = begin; n < end; n += kGemmColumns) {
      const int64_t columns = end - n < kGemmColumns ? end - n : kGemmColumns;
      multiply(reinterpret_cast<const Packed*>(packed), rows, n, columns, sums[0]);
      if (gated) multiply(reinterpret_cast<const Packed*>(packed), rows, call_.n + n, columns, sums[1]);
      for (int64_t m = 0; m < rows; m++) {
        finish(row + m, n, columns, sums[0] + m * kGemmColumns, sums[1] + m * kGemmColumns);
      }
    }
  }

  // The epilogue of rows [begin, end) over a product that somebody else computed.
  template <class P>
  void run_epilogue(const P* product, int64_t begin, int64_t end) const {
    const int64_t halves = call_.activation == FLASHMLA_SILU_MUL ? 2 : 1;
    float sums[2][kGemmColumns];
    for (int64_t m = begin; m < end; m++) {
      for (int64_t n = 0; n < call_.n; n += kGemmColumns) {
        const int64_t columns = call_.n - n < kGemmColumns ? call_.n - n : kGemmColumns;
        for (int64_t half = 0; half < halves; half++) {
          const P* from = product + (m * halves + half) * call_.n + n;
          for (int64_t i = 0; i < columns; i++) sums[half][i] = to_float(from[i]);
        }
        finish(m, n, columns, sums[0], sums[1]);
      }
    }
  }

private:
  // sums [rows, kGemmColumns] = packed rows x weight rows [n, n + columns). With few rows of a, four or two weight rows
  // are read along their whole length and meet all of them in registers; with more, four weight rows are read (and
  // widened, if need be) in chunks that stay in L1 while they meet one group of rows after another.
  void multiply(const Packed* a, int64_t rows, int64_t n, int64_t columns, float* sums) const {
    const W* weight = static_cast<const W*>(call_.weight) + n * call_.weight_stride;
    for (int64_t j = 0, count; j < columns; j += count) {
      const W* w = weight + j * call_.weight_stride;
      const int64_t left = columns - j;
      count = left < 2 ? 1 : left < 4 || (rows > Isa::gemm_m && rows <= 2 * Isa::gemm_m) ? 2 : 4;
      if (count == 1) {
        whole<1, 2 * Isa::gemm_m>(w, a, rows, sums + j);
      } else if (count == 2) {
        whole<2, 2 * Isa::gemm_m>(w, a, rows, sums + j);
      } else if (rows <= Isa::gemm_m) {
        whole<4, Isa::gemm_m>(w, a, rows, sums + j);
      } else {
        in_chunks(w, a, rows, sums + j);
      }
    }
  }
  template <int R, int M>
  void whole(const W* w, const Packed* a, int64_t rows, float* sums) const {
    tiles<R, M>(w, call_.weight_stride, w + R * call_.weight_stride, a, rows, call_.k, sums, true);
  }
  void in_chunks(const W* w, const Packed* a, int64_t rows, float* sums) const {
    const int64_t stride = call_.weight_stride;
    for (int64_t k = 0; k < call_.k; k += kGemmDepth) {
      const bool last = k + kGemmDepth >= call_.k;
      const int64_t depth = last ? call_.k - k : kGemmDepth;
      const W* next = last ? w + 4 * stride : w + k + depth;
      if constexpr (std::is_same_v<W, Packed>) {
        tiles<4, Isa::gemm_m>(w + k, stride, next, a + k, rows, depth, sums, k == 0);
      } else {
        Packed wide[4 * kGemmDepth];
        for (int r = 0; r < 4; r++) widen(w + r * stride + k, next + r * stride, depth, wide + r * kGemmDepth);
        tiles<4, Isa::gemm_m>(wide, kGemmDepth, static_cast<const Packed*>(nullptr), a + k, rows, depth, sums, k == 0);
      }
    }
  }

  // To the type that a is packed in; fetches as many weights from `next` on.
  void widen(const W* from, const W* next, int64_t n, Packed* to) const {
    for (int64_t i = 0; i < n; i += 64 / int64_t{sizeof(W)}) __builtin_prefetch(next + i, 0, 3);
    int64_t i = 0;
    if constexpr (pairs) {
      for (; i + kStep <= n; i += kStep) Isa::store(reinterpret_cast<uint32_t*>(to + i), Isa::load_pairs(from + i));
      for (; i < n; i++) from_float(to_float(from[i]), to[i]);
    } else {
      for (; i + kStep <= n; i += kStep) Isa::store(to + i, Isa::load(from + i));
      for (; i < n; i++) to[i] = to_float(from[i]);
    }
  }

  // R weight rows and all rows of a, up to M at a time. `next`: where these R rows are read after this, or null.
  template <int R, int M, class V>
  void tiles(const V* w, int64_t w_stride, const V* next, const Packed* a, int64_t rows, int64_t depth, float* sums,
             bool first) const {
    const int64_t stride = packed_stride(call_.k);
    for (int64_t m = 0; m < rows; m += M, next = nullptr) {
      const int64_t left = rows - m < M ? rows - m : M;
      sized_tile<R, M>(w, w_stride, next, a + m * stride, left, depth, sums + m * kGemmColumns, first);
    }
  }
  template <int R, int M, class V>
  void sized_tile(const V* w, int64_t w_stride, const V* next, const Packed* a, int64_t rows, int64_t depth,
                  float* sums, bool first) const {
    if (rows == M) {
      next ? tile<R, M, true>(w, w_stride, next, a, depth, sums, first)
           : tile<R, M, false>(w, w_stride, next, a, depth, sums, first);
    } else if constexpr (M > 1) {
      sized_tile<R, M - 1>(w, w_stride, next, a, rows, depth, sums, first);
    }
  }

  template <int R, int M, bool PREFETCH, class V>
  void tile(const V* w, int64_t w_stride, const V* next, const Packed* a, int64_t depth, float* sums,
            bool first) const {
    // Several accumulators for each product where there are registers: four alone would wait for one another.
    constexpr int kChains = R * M <= 2 ? 4 : R * M <= 4 ? 2 : 1;
    F c[R][M][kChains] = {};
    const int64_t stride = packed_stride(call_.k);
    // R rows are R streams, which the processor's own prefetcher follows late and never across 4 KB: what is fetched is
    // kAhead further along these rows or, near their end, where they are read next.
    constexpr int64_t kAhead = 1024 / sizeof(V);
    const V *along = w + kAhead, *beyond = next - (depth - kAhead);
    int64_t i = 0;
    for (; i + kChains * kStep <= depth; i += kChains * kStep) {
      const V* ahead = i + kAhead < depth ? along : beyond;
#pragma GCC unroll 4
      for (int u = 0; u < kChains; u++) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          if constexpr (PREFETCH) __builtin_prefetch(ahead + r * w_stride + i + u * kStep, 0, 3);
          const auto v = operand(w + r * w_stride + i + u * kStep);
#pragma GCC unroll 16
          for (int m = 0; m < M; m++) c[r][m][u] = mac(c[r][m][u], v, a + m * stride + i + u * kStep);
        }
      }
    }
    for (; i < depth; i += kStep) {
      for (int r = 0; r < R; r++) {
        V part[kStep] = {};
        std::memcpy(part, w + r * w_stride + i, size_t(depth - i < kStep ? depth - i : kStep) * sizeof(V));
        const auto v = operand(part);
        for (int m = 0; m < M; m++) c[r][m][0] = mac(c[r][m][0], v, a + m * stride + i);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        F total = c[r][m][0];
#pragma GCC unroll 4
        for (int u = 1; u < kChains; u++) total += c[r][m][u];
        float& sum = sums[m * kGemmColumns + r];
        sum = (first ? 0 : sum) + Isa::sum(total);
      }
    }
  }

  template <class V>
  static auto operand(const V* w) {
    if constexpr (pairs) {
      return Isa::load_pairs(w);
    } else {
      return Isa::load(w);
    }
  }
  template <class V>
  static F mac(F c, V v, const Packed* a) {
    if constexpr (pairs) {
      return Isa::dot(c, v, Isa::load(reinterpret_cast<const uint32_t*>(a)));
    } else {
      return Isa::fma(v, Isa::load(a), c);
    }
  }

  // Scale, bias, activation, residual and rounding of columns [n, n + columns) of row m. Sums may be overwritten past
  // `columns`, up to a whole vector.
  void finish(int64_t m, int64_t n, int64_t columns, float* sums, float* gated) const {
    scale_and_bias(sums, n, columns);
    if (call_.activation == FLASHMLA_SILU_MUL) scale_and_bias(gated, call_.n + n, columns);
    switch (call_.activation) {
      case FLASHMLA_NONE:
        break;
      case FLASHMLA_RELU:
        for (int64_t i = 0; i < columns; i++) sums[i] = sums[i] < 0 ? 0 : sums[i];
        break;
      case FLASHMLA_GELU:
        for (int64_t i = 0; i < columns; i++) sums[i] *= 0.5f * (1 + std::erf(sums[i] * 0.70710678118654752440f));
        break;
      default:
        for (int64_t i = 0; i < columns; i += Isa::W) {
          F y = silu(Isa::load(sums + i));
          if (call_.activation == FLASHMLA_SILU_MUL) y *= Isa::load(gated + i);
          Isa::store(sums + i, y);
        }
    }
    with_element(call_.out_dtype, [&](auto o) {
      using O = decltype(o);
      write(static_cast<O*>(call_.out), static_cast<const O*>(call_.residual), m, n, columns, sums);
    });
  }
  void scale_and_bias(float* sums, int64_t n, int64_t columns) const {
    const float* scale = call_.weight_scale ? call_.weight_scale + n : nullptr;
    for (int64_t i = 0; scale && i < columns; i++) sums[i] *= scale[i];
    if (call_.bias == nullptr) return;
    with_element(call_.a_dtype, [&](auto a) {
      const auto* bias = static_cast<const decltype(a)*>(call_.bias) + n;
      for (int64_t i = 0; i < columns; i++) sums[i] += to_float(bias[i]);
    });
  }
  // x / (1 + 2^(-x log2 e)), with the exponential of a number that is not positive: of -|x|.
  static F silu(F x) {
    const F magnitude = Isa::max(x, -x);
    const F e = exp2<Isa>(magnitude * Isa::set1(-kLog2E));
    const F one = Isa::set1(1.0f);
    return x * (x < F{} ? e : one) / (one + e);
  }
  template <class O>
  void write(O* out, const O* residual, int64_t m, int64_t n, int64_t columns, const float* sums) const {
    out += m * call_.out_stride + n;
    if (residual) residual += m * call_.residual_stride + n;
    int64_t i = 0;
    for (; i + Isa::W <= columns; i += Isa::W) {
      F y = Isa::load(sums + i);
      if (residual) y += Isa::load(residual + i);
      Isa::store(out + i, y);
    }
    for (; i < columns; i++) from_float(sums[i] + (residual ? to_float(residual[i]) : 0), out[i]);
  }

  const FlashmlaGemm& call_;
};

}  // namespace flashmla::FLASHMLA_ISA
