// Vectors of LANES floats in the compiler's own vector extension: runs on any processor. Other instruction sets derive
// from this and replace what the compiler would not find by itself.
//
// PAIRS says that products are taken over pairs of bf16 with fp32 accumulation (what vdpbf16ps does). Portable<16,
// true> therefore runs the AVX-512 BF16 kernels' every layout and loop on a processor without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#include "flashmla/dtypes.h"

namespace flashmla::FLASHMLA_ISA {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <int LANES, bool PAIRS>
struct Portable {
  static constexpr int W = LANES;
  static constexpr bool pairs = PAIRS;
  // Register tiles: qk_m tokens x qk_n vectors of rows, and pv_m rows x pv_n vectors of columns. Eight accumulators
  // fill the sixteen 128-bit registers of the oldest x86-64 together with their operands.
  static constexpr int qk_m = 4, qk_n = 2, pv_m = 4, pv_n = 2;
  static constexpr int pair_m = 4, pair_n = 2;  // pv_m and pv_n for pairs, whose vectors take work to make
  // Rows of a that weight rows meet at once, in how large groups more of them do, and sums kept for them.
  static constexpr int gemm_m = 4, gemm_group = 4, gemm_sums = 12;
  // Rows of a that panels of weights meet at once, and vectors of columns for so many.
  static constexpr int panel_m = 4, panel_n = 4;
  static constexpr int block = 64;  // tokens staged at a time
  // How often a tile's loop stops for prefetches; 0: never. With 16 registers, gcc 12 would spill the accumulators.
  static constexpr int step = 0;

  using F = typename VectorOf<float, LANES>::type;
  using I = typename VectorOf<int32_t, LANES>::type;
  using U = typename VectorOf<uint32_t, LANES>::type;
  using H = typename VectorOf<uint16_t, LANES>::type;

  static F set1(float x) { return x - F{}; }
  static U set1(uint32_t x) { return x - U{}; }
  static F load(const float* p) { return copy<F>(p); }
  static U load(const uint32_t* p) { return copy<U>(p); }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static void store(uint32_t* p, U x) { std::memcpy(p, &x, sizeof x); }

  static F load(const bf16* p) { return reinterpret<F>(widen(p) << 16); }
  static F load(const f16* p) {
    const U half = widen(p), magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000) << 16;
    const U special = (magnitude >= (0x7c00u << 13)) & (0xffu << 23);  // inf and nan keep an exponent of all ones
    const F scaled = reinterpret<F>(magnitude) * set1(0x1p112f);       // exact, subnormals included
    return reinterpret<F>(reinterpret<U>(scaled) | special | sign);
  }
  static F load(const i8* p) {
    const auto bytes = copy<typename VectorOf<int8_t, LANES>::type>(p);
    return __builtin_convertvector(__builtin_convertvector(bytes, I), F);
  }
  static void store(bf16* p, F x) {
    const H narrow = __builtin_convertvector(round_to_bf16(x), H);
    std::memcpy(p, &narrow, sizeof narrow);
  }
  static void store(f16* p, F x) {
    for (int i = 0; i < W; i++) p[i] = to_f16(x[i]);
  }

  static F fma(F a, F b, F c) { return a * b + c; }
  // The second operand where either is NaN, as the x86 instruction.
  static F max(F a, F b) { return a > b ? a : b; }
  static float sum(F x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
  }
  // Lane i: the sum of vector i.
  static F sums(const float* vectors) {
    F s;
    for (int i = 0; i < W; i++) s[i] = sum(load(vectors + i * W));
    return s;
  }
  static float max(F x) {
    float s = x[0];
    for (int i = 1; i < W; i++) s = s > x[i] ? s : x[i];
    return s;
  }

  // c + a.lo * b.lo + a.hi * b.hi, the operands being pairs of bf16 in one dword.
  static F dot(F c, U a, U b) {
    const F lo = reinterpret<F>(a << 16) * reinterpret<F>(b << 16);
    return c + lo + reinterpret<F>(a & 0xffff0000u) * reinterpret<F>(b & 0xffff0000u);
  }
  // c + a.lo * b.lo + a.hi * b.hi, the operands being pairs of 16-bit integers.
  static I dot(I c, U a, U b) {
    const I lo = (reinterpret<I>(a << 16) >> 16) * (reinterpret<I>(b << 16) >> 16);
    return c + lo + (reinterpret<I>(a) >> 16) * (reinterpret<I>(b) >> 16);
  }
  static U load_pairs(const bf16* p) { return copy<U>(p); }
  static U load_pairs(const i8* p) {
    U pairs;
    for (int i = 0; i < W; i++) {
      bf16 lo, hi;
      from_float(to_float(p[2 * i]), lo), from_float(to_float(p[2 * i + 1]), hi);
      pairs[i] = lo.bits | uint32_t{hi.bits} << 16;
    }
    return pairs;
  }
  static F dot_at(F c, U a, const uint32_t* b) { return dot(c, a, set1(*b)); }
  static U pack(F lo, F hi) { return round_to_bf16(lo) | (round_to_bf16(hi) << 16); }
  // Pairs (first[i], second[i]): what a product over two tokens takes.
  static U interleave(const bf16* first, const bf16* second) { return widen(first) | (widen(second) << 16); }

  static U interleave(const i8* first, const i8* second) { return pack(load(first), load(second)); }

  // Integers of four bits, eight in a dword: element J of eight as floats, and pair S of four as pairs of bf16.
  // Elements 0, 2, 4 and 6 lie in the lower half, the others in the upper, so that a pair's halves are each where they
  // belong.
  template <int J>
  static F int4(U x) {
    return __builtin_convertvector(reinterpret<I>(x << (28 - (J % 2 * 16 + J / 2 * 4))) >> 28, F);
  }
  template <int S>
  static U int4_pairs(U x) {
    return pack(int4<2 * S>(x), int4<2 * S + 1>(x));
  }

  // N units from p on, again and again.
  template <int N>
  static U repeated(const bf16* p) {
    U x;
    for (int i = 0; i < W; i++) std::memcpy(reinterpret_cast<uint32_t*>(&x) + i, p + i % N * 2, 4);
    return x;
  }
  // The sum of lanes 2 i and 2 i + 1, of a and then of b.
  static F add_neighbours(F a, F b) {
    F x;
    for (int i = 0; i < W; i++) x[i] = i < W / 2 ? a[2 * i] + a[2 * i + 1] : b[2 * i - W] + b[2 * i + 1 - W];
    return x;
  }
  template <int N>
  static F rotate(F x) {
    F y;
    for (int i = 0; i < W; i++) y[i] = x[(i + N) % W];
    return y;
  }
  // Lanes i and i + N become a pair of bf16, for all i of which i / N is even; in order.
  template <int N>
  static void pack_neighbours(uint32_t* p, F x) {
    const U bits = round_to_bf16(x);
    for (int i = 0; i < W / 2; i++) {
      const int first = i / N * 2 * N + i % N;
      p[i] = bits[first] | bits[first + N] << 16;
    }
  }

  template <class To, class From>
  static To reinterpret(From x) {
    static_assert(sizeof(To) == sizeof(From));
    return (To)x;
  }

private:
  template <class V>
  static V copy(const void* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static U widen(const void* p) { return __builtin_convertvector(copy<H>(p), U); }
  // The upper half of each dword rounded to nearest even, in the lower half; a NaN stays one.
  static U round_to_bf16(F x) {
    const U bits = reinterpret<U>(x);
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x == x ? rounded : (bits >> 16) | 0x40u;
  }
};

}  // namespace flashmla::FLASHMLA_ISA
