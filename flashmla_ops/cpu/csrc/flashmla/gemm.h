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
constexpr int kGemmDepth = 1024;  // elements of k that stay in L1: four weight rows and the rows of a they meet

// PAIRS: bf16 on both sides and a processor that multiplies it, so that rows are read as pairs and a stays as it is.
template <class Isa, class W, bool PAIRS>
class Gemm {
  using F = typename Isa::F;
  static constexpr bool pairs = PAIRS;
  using Packed = std::conditional_t<pairs, bf16, float>;
  static constexpr int kStep = pairs ? 2 * Isa::W : Isa::W;  // elements of k in a vector

public:
  explicit Gemm(const FlashmlaGemm& call) : call_(call) {}

  static int64_t packed_stride(int64_t k) { return round_up(k, 2 * Isa::W); }
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
  // sums [rows, kGemmColumns] = packed rows x weight rows [n, n + columns)
  void multiply(const Packed* a, int64_t rows, int64_t n, int64_t columns, float* sums) const {
    // Accumulators: 4 weight rows times these. AVX2 has 16 registers, AVX-512 has 32.
    constexpr int kTile = Isa::W >= 16 ? 4 : 2;
    const W* weight = static_cast<const W*>(call_.weight) + n * call_.weight_stride;
    for (int64_t j = 0; j < columns;) {
      const int64_t left = columns - j;
      for (int64_t k = 0; k < call_.k; k += kGemmDepth) {
        const int64_t depth = call_.k - k < kGemmDepth ? call_.k - k : kGemmDepth;
        for (int64_t m = 0; m < rows;) {
          const W* w = weight + j * call_.weight_stride + k;
          const Packed* x = a + m * packed_stride(call_.k) + k;
          float* s = sums + m * kGemmColumns + j;
          const bool first = k == 0, fetch = m == 0;
          if (left >= 4) {
            if (rows - m >= kTile)
              tile<4, kTile>(w, x, depth, s, first, fetch), m += kTile;
            else
              tile<4, 1>(w, x, depth, s, first, fetch), m += 1;
          } else {
            tile<1, 1>(w, x, depth, s, first, fetch), m += 1;
          }
        }
      }
      j += left >= 4 ? 4 : 1;
    }
  }

  template <int R, int M>
  void tile(const W* w, const Packed* a, int64_t depth, float* sums, bool first, bool fetch) const {
    // Two accumulators for each product where there are registers: four alone would wait for one another.
    constexpr int kChains = R * M <= 4 ? 2 : 1;
    F c[R][M][kChains] = {};
    const int64_t stride = packed_stride(call_.k);
    int64_t i = 0;
    for (; i + kChains * kStep <= depth; i += kChains * kStep) {
      // Rows are several streams at once, which the processor's own prefetcher follows late: 2 KB ahead.
      if (fetch) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
          __builtin_prefetch(reinterpret_cast<const char*>(w + r * call_.weight_stride + i) + 2048, 0, 2);
      }
#pragma GCC unroll 2
      for (int u = 0; u < kChains; u++) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const auto v = operand(w + r * call_.weight_stride + i + u * kStep);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) c[r][m][u] = mac(c[r][m][u], v, a + m * stride + i + u * kStep);
        }
      }
    }
    for (; i < depth; i += kStep) {
      for (int r = 0; r < R; r++) {
        W part[kStep] = {};
        std::memcpy(part, w + r * call_.weight_stride + i, size_t(depth - i < kStep ? depth - i : kStep) * sizeof(W));
        const auto v = operand(part);
        for (int m = 0; m < M; m++) c[r][m][0] = mac(c[r][m][0], v, a + m * stride + i);
      }
    }
    for (int r = 0; r < R; r++) {
      for (int m = 0; m < M; m++) {
        F total = c[r][m][0];
        if constexpr (kChains == 2) total += c[r][m][1];
        float& sum = sums[m * kGemmColumns + r];
        sum = (first ? 0 : sum) + Isa::sum(total);
      }
    }
  }

  static auto operand(const W* w) {
    if constexpr (pairs) {
      return Isa::load(reinterpret_cast<const uint32_t*>(w));
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
