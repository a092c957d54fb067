// 2^x and the block-wise online softmax, for scores laid out [token][row]: a lane is a query row, so nothing is
// horizontal.
#pragma once

#include <cmath>
#include <initializer_list>

#include "flashmla/kernels.h"

namespace flashmla::FLASHMLA_ISA {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Vectors that exp2 takes at once, step by step: a core's scheduler holds too few instructions for it to find another
// vector's behind those that wait for the one before.
constexpr int kExp = 4;

// 2^x for x <= 0 up to rounding; 0 below -126 and for -inf; NaN stays NaN. Relative error below 3e-7: the polynomial is
// a degree-5 minimax fit of 2^r on [-1/2, 1/2].
template <class Isa, int N>
inline __attribute__((always_inline)) void exp2(typename Isa::F (&x)[N]) {
  using F = typename Isa::F;
  using I = typename Isa::I;
  // Adding this puts round(x) + 127, the exponent field of 2^round(x), in the low bits of the mantissa.
  const F magic = Isa::set1(0x1.8p23f + 127.0f);
  F shifted[N], r[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) shifted[i] = x[i] + magic;
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) r[i] = x[i] - (shifted[i] - magic), p[i] = Isa::set1(1.32647273e-3f);
#pragma GCC unroll 8
  for (const float c : {9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f}) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) p[i] = Isa::fma(p[i], r[i], Isa::set1(c));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) {
    const F power = Isa::template reinterpret<F>(Isa::template reinterpret<I>(shifted[i]) << 23);
    x[i] = x[i] < Isa::set1(-126.0f) ? F{} : p[i] * power;
  }
}
template <class Isa>
typename Isa::F exp2(typename Isa::F x) {
  typename Isa::F one[1] = {x};
  exp2<Isa>(one);
  return one[0];
}

// The maximum to subtract: -inf where nothing is visible would make -inf - -inf.
template <class F>
F finite_maximum(F m) {
  return m == F{} - INFINITY ? F{} : m;
}

// tanh(x), of relative error below 3e-7: Cephes' polynomial below 0.625, and above it (1 - e) / (1 + e), e being exp(-2
// x) (Moshier, Methods and Programs for Mathematical Functions, 1989).
template <class Isa>
typename Isa::F tanh(typename Isa::F x) {
  using F = typename Isa::F;
  const F size = Isa::max(x, F{} - x), square = x * x;
  F p = Isa::set1(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) {
    p = Isa::fma(p, square, Isa::set1(c));
  }
  const F e = exp2<Isa>(size * Isa::set1(-2 * kLog2E));
  const F far = (Isa::set1(1.0f) - e) / (Isa::set1(1.0f) + e);
  const F signed_far = x < F{} ? F{} - far : far;
  return size < Isa::set1(0.625f) ? Isa::fma(p * square, x, x) : signed_far;
}

// What products of queries and keys are scaled by on their way to powers of two. With a softcap they have been capped.
inline float score_scale(const FlashmlaDecode& call) {
  return (call.softcap > 0 ? call.softcap : call.softmax_scale) * kLog2E;
}
// Products of queries and keys become tanh(product * softmax_scale / softcap), if there is a softcap. n is a multiple
// of a vector.
template <class Isa>
void cap_scores(const FlashmlaDecode& call, float* scores, int64_t n, float softmax_scale) {
  if (!(call.softcap > 0)) return;
  const double factor = double(softmax_scale) / call.softcap, most = 3.4e38;
  const auto scale = Isa::set1(float(factor > most ? most : factor < -most ? -most : factor));
  for (int64_t i = 0; i < n; i += Isa::W) Isa::store(scores + i, tanh<Isa>(Isa::load(scores + i) * scale));
}

// One vector of rows over the scores [begin, n) of a block, `step` floats apart; a score counts times `scale`, which is
// no less than 0, and only from `hidden` of its row on and before `visible` (`all`: these hide none). `begin` is a
// multiple of kExp.
template <class Isa>
struct BlockScores {
  using F = typename Isa::F;
  const float* scores;
  int64_t step;
  int begin, n;
  F scale, hidden, visible;
  bool all;

  // The larger of `maximum` and theirs.
  F maximum(F maximum) const {
    if (n <= begin) return maximum;
    if (all) {
      F largest = Isa::load(scores + begin * step);
      for (int t = begin + 1; t < n; t++) largest = Isa::max(largest, Isa::load(scores + t * step));
      return Isa::max(maximum, largest * scale);
    }
    for (int t = begin; t < n; t++) maximum = Isa::max(maximum, hide(t, Isa::load(scores + t * step) * scale));
    return maximum;
  }

  // Calls each(t, weights) for the weights 2^(score - maximum) of kExp tokens from t on, those past n being 0. The
  // maximum was `old` before this block. Adds the weights to l; returns what earlier results must be scaled with.
  template <class Each>
  __attribute__((always_inline)) F weigh(F old, F maximum, float* l, Each each) const {
    const F subtract = finite_maximum(maximum), rescale = exp2<Isa>(old - subtract);
    F total = Isa::load(l) * rescale;
    static_assert(kExp == 4);
    for (int t = begin; t < n; t += kExp) {
      F p[kExp];
#pragma GCC unroll 8
      for (int i = 0; i < kExp; i++) p[i] = Isa::fma(Isa::load(scores + (t + i) * step), scale, F{} - subtract);
      if (!all || t + kExp > n) {
        for (int i = 0; i < kExp; i++) p[i] = hide(t + i, p[i]);
      }
      exp2<Isa>(p);
      total += (p[0] + p[1]) + (p[2] + p[3]);
      each(t, p);
    }
    Isa::store(l, total);
    return rescale;
  }

private:
  F hide(int t, F s) const {
    const F at = Isa::set1(float(t)), nothing = F{} - INFINITY;
    return at < visible ? (at < hidden ? nothing : s) : nothing;
  }
};

}  // namespace flashmla::FLASHMLA_ISA
