// 2^x and the block-wise online softmax, for scores laid out [token][row]: a lane is a query row, so nothing is
// horizontal.
#pragma once

#include <cmath>

#include "flashmla/kernels.h"

namespace flashmla::FLASHMLA_ISA {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// 2^x for x <= 0 up to rounding; 0 below -126 and for -inf; NaN stays NaN. Relative error below 3e-7: the polynomial is
// a degree-5 minimax fit of 2^r on [-1/2, 1/2].
template <class Isa>
typename Isa::F exp2(typename Isa::F x) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  // Adding this puts round(x) + 127, the exponent field of 2^round(x), in the low bits of the mantissa.
  const F magic = Isa::set1(0x1.8p23f + 127.0f);
  const F shifted = x + magic;
  const F r = x - (shifted - magic);
  F p = Isa::set1(1.32647273e-3f);
  p = Isa::fma(p, r, Isa::set1(9.67151299e-3f));
  p = Isa::fma(p, r, Isa::set1(5.55073358e-2f));
  p = Isa::fma(p, r, Isa::set1(2.40222424e-1f));
  p = Isa::fma(p, r, Isa::set1(6.93147004e-1f));
  p = Isa::fma(p, r, Isa::set1(1.0f));
  const F power = Isa::template reinterpret<F>(Isa::template reinterpret<I>(shifted) << 23);
  return x < Isa::set1(-126.0f) ? F{} : p * power;
}

// The maximum to subtract: -inf where nothing is visible would make -inf - -inf.
template <class F>
F finite_maximum(F m) {
  return m == F{} - INFINITY ? F{} : m;
}

// One vector of rows over a block of n scores, `step` floats apart: scales them, hides those at or past `visible` of
// each row (`all`: there are none) and returns the larger of `maximum` and theirs.
template <class Isa>
typename Isa::F scale_scores(float* scores, int64_t step, int n, typename Isa::F scale, typename Isa::F visible,
                             bool all, typename Isa::F maximum) {
  using F = typename Isa::F;
  const F minus_infinity = Isa::set1(-INFINITY);
  for (int t = 0; t < n; t++) {
    F s = Isa::load(scores + t * step) * scale;
    if (!all) s = Isa::set1(float(t)) < visible ? s : minus_infinity;
    Isa::store(scores + t * step, s);
    maximum = Isa::max(maximum, s);
  }
  return maximum;
}

// Scaled scores become weights, `maximum` having been `old` before them; adds them to l and returns the factor that
// earlier results must be scaled with.
template <class Isa>
typename Isa::F weigh_scores(float* scores, int64_t step, int n, typename Isa::F old, typename Isa::F maximum,
                             float* l) {
  using F = typename Isa::F;
  const F subtract = finite_maximum(maximum);
  const F rescale = exp2<Isa>(old - subtract);
  F total = Isa::load(l) * rescale;
  for (int t = 0; t < n; t++) {
    const F p = exp2<Isa>(Isa::load(scores + t * step) - subtract);
    Isa::store(scores + t * step, p);
    total += p;
  }
  Isa::store(l, total);
  return rescale;
}

}  // namespace flashmla::FLASHMLA_ISA
