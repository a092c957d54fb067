// AVX-512: 16 lanes, 32 registers; with PAIRS also AVX512_BF16 (vdpbf16ps: two bf16 products a lane, fp32
// accumulation).
#pragma once

#include <immintrin.h>

#include "flashmla/isa/portable.h"

namespace flashmla::FLASHMLA_ISA {

template <bool PAIRS>
struct Avx512 : Portable<16, PAIRS> {
  using Base = Portable<16, PAIRS>;
  using typename Base::F, typename Base::U, typename Base::I;
  // At least 12 accumulators: 2 products a cycle with a latency of 6. 16 tokens a tile divide every usual page size.
  static constexpr int qk_m = 8, qk_n = 2, pv_m = 8, pv_n = 3, pair_m = 16, pair_n = 1;
  static constexpr int gemm_m = 6, gemm_group = 4, gemm_sums = 24, panel_m = 12, panel_n = 2;
  static constexpr int block = 128, step = 24;  // step: at 16 heads 8 is no better, 48 is 4 % worse

  using Base::load, Base::max, Base::store;
  static F load(const f16* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(f16* p, F x) {
    const __m256i half = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  // gcc 12 splits these conversions into halves and quarters when it vectorises them itself.
  static F load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }
  static F load(const i8* p) {
    return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // By looking up the value of each four bits: the instructions ignore what lies above those that they need.
  template <int J>
  static F int4(U x) {
    const F values{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    return (F)_mm512_permutexvar_ps((__m512i)(x >> (J % 2 * 16 + J / 2 * 4)), (__m512)values);
  }
  static F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
  static float max(F x) { return _mm512_reduce_max_ps((__m512)x); }
  using Base::dot;
#ifdef __AVX512VNNI__
  static I dot(I c, U a, U b) { return (I)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }
#else
  static I dot(I c, U a, U b) { return c + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#endif
  static float sum(F x) { return _mm512_reduce_add_ps((__m512)x); }
  static F sums(const float* vectors) {
    __m512 fours[4];  // [i]: in quarter q the sums over quarter q of vectors 4 i ... 4 i + 3
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) fours[i] = quarter_sums(vectors + 4 * i * 16);
    const __m512 low = halves(fours[0], fours[1]), high = halves(fours[2], fours[3]);
    return (F)halves(low, high);
  }

#ifdef __AVX512BF16__
  // Both instructions take and return subnormal numbers as zero, whatever MXCSR says.
  static F dot(F c, U a, U b) { return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
  using Base::load_pairs;
  static U load_pairs(const i8* p) { return (U)_mm512_cvtne2ps_pbh((__m512)load(p + 16), (__m512)load(p)); }
#ifndef FLASHMLA_ASSUME_AVX512
  // gcc 12 does not fold the broadcast into the instruction.
  static F dot_at(F c, U a, const uint32_t* b) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(a), "m"(*b));
    return c;
  }
#endif
  static U pack(F lo, F hi) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)lo));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)hi));
    return (U)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static U interleave(const bf16* first, const bf16* second) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    return (U)_mm512_permutex2var_epi16(_mm512_castsi256_si512(a), (__m512i)alternating<32>(),
                                        _mm512_castsi256_si512(b));
  }

  static U interleave(const i8* first, const i8* second) {
    const __m512i words = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(second), (__m512)load(first));
    return (U)_mm512_permutexvar_epi16((__m512i)alternating<16>(), words);
  }

  template <int S>
  static U int4_pairs(U x) {
    // bf16 of 0 ... 7 and -8 ... -1, twice: which of both is read depends on the lowest bit of the next element.
    const Words values{0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
                       0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                       0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    const __m512i shifted = S == 0 ? (__m512i)x : _mm512_srli_epi16((__m512i)x, 4 * S);
    return (U)_mm512_permutexvar_epi16(shifted, (__m512i)values);
  }

  template <int N>
  static U repeated(const bf16* p) {
    if constexpr (N == 2) {
      return (U)_mm512_set1_epi64(bits<int64_t>(p));
    } else if constexpr (N == 4) {
      return (U)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else if constexpr (N == 8) {
      return (U)_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    } else {
      static_assert(N == 16);
      return (U)_mm512_loadu_si512(p);
    }
  }
  static F add_neighbours(F a, F b) {
    const I even{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
    return (F)_mm512_permutex2var_ps((__m512)a, (__m512i)even, (__m512)b) +
           (F)_mm512_permutex2var_ps((__m512)a, (__m512i)odd, (__m512)b);
  }
  template <int N>
  static F rotate(F x) {
    return (F)_mm512_castsi512_ps(
        _mm512_alignr_epi32(_mm512_castps_si512((__m512)x), _mm512_castps_si512((__m512)x), N));
  }
  template <int N>
  static void pack_neighbours(uint32_t* p, F x) {
    typename VectorOf<uint16_t, 16>::type order;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) order[i] = uint16_t(i / 2 / N * 2 * N + i / 2 % N + i % 2 * N);
    const __m256i words = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutexvar_epi16((__m256i)order, words));
  }

private:
  template <class X>
  static X bits(const void* p) {
    X x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  using Words = typename VectorOf<uint16_t, 32>::type;
  // Word i of the first operand, then word i of what begins DISTANCE words later.
  template <int DISTANCE>
  static Words alternating() {
    Words order;
#pragma GCC unroll 32
    for (int i = 0; i < 32; i++) order[i] = uint16_t(i / 2 + i % 2 * DISTANCE);
    return order;
  }
#endif

private:
  static __m512 quarter_sums(const float* vectors) {
    const auto pair = [&](int i) {
      const __m512 x = (__m512)load(vectors + i * 16), y = (__m512)load(vectors + (i + 1) * 16);
      return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    };
    const __m512d x = _mm512_castps_pd(pair(0)), y = _mm512_castps_pd(pair(2));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  // The sums of neighbouring quarters: of x, then of y.
  static __m512 halves(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
};

}  // namespace flashmla::FLASHMLA_ISA
