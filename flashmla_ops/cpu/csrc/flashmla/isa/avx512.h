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
  // 24 accumulators each (vdpbf16ps: 2 a cycle, latency 6, so at least 12); the broadcast is a memory operand.
  static constexpr int qk_m = 12, qk_n = 2, pv_m = 8, pv_n = 3;
  static constexpr int gemm_m = 6;
  static constexpr int block = 96;

  using Base::load, Base::max, Base::store;
  static F load(const f16* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(f16* p, F x) {
    const __m256i half = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  static F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
  static float sum(F x) { return _mm512_reduce_add_ps((__m512)x); }

#ifdef __AVX512BF16__
  static F dot(F c, U a, U b) { return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
  static U pack(F lo, F hi) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)lo));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)hi));
    return (U)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
#endif
};

}  // namespace flashmla::FLASHMLA_ISA
