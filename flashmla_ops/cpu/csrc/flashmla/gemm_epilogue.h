// The work that follows the product of a gemm: scale, bias, activation, residual and rounding.
#pragma once

#include <cmath>

#include "flashmla/dtypes.h"
#include "flashmla/softmax.h"

namespace flashmla::FLASHMLA_ISA {

constexpr int kGemmColumns = 48;  // columns of out that are finished at a time; 48 divides by every tile's weight rows

template <class Isa>
class Epilogue {
  using F = typename Isa::F;

public:
  explicit Epilogue(const FlashmlaGemm& call) : call_(call) {}

  // Over rows [begin, end) of a product that somebody else computed: [m, rows of weight].
  template <class P>
  void run(const P* product, int64_t begin, int64_t end) const {
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

  // Columns [n, n + columns) of row m, whose sums, and those of their gates with silu_mul, may be overwritten past
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

private:
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
