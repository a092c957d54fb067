// AVX2 + FMA + F16C: 8 lanes, 16 registers. bf16 has no product of its own here: rows are widened to fp32 when staged.
#pragma once

#include <immintrin.h>

#include "flashmla/isa/portable.h"

namespace flashmla::FLASHMLA_ISA {

struct Avx2 : Portable<8, false> {
  // 12 accumulators each: 2 FMA a cycle with a latency of 4 need at least 8. 6 x 2 leaves 2 registers for the rows and
  // 1 for the broadcast; 4 x 3 leaves 3 and 1, and 4 divides every padded number of rows.
  static constexpr int qk_m = 6, qk_n = 2, pv_m = 4, pv_n = 3, panel_m = 6, panel_n = 2;
  // 72 is a multiple of qk_m, and 72 rows of 576 floats (166 KB) stay in a 512 KB L2 beside the accumulators.
  static constexpr int block = 72;

  using Portable::load, Portable::max, Portable::store;
  static F load(const f16* p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(f16* p, F x) {
    const __m128i half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  static F load(const i8* p) {  // gcc 12 converts these one by one
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
  using Portable::dot;
  static I dot(I c, U a, U b) { return c + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
  static F sums(const float* vectors) {
    const auto pair = [&](int i) {
      return _mm256_hadd_ps((__m256)load(vectors + i * W), (__m256)load(vectors + (i + 1) * W));
    };
    const __m256 low = _mm256_hadd_ps(pair(0), pair(2)), high = _mm256_hadd_ps(pair(4), pair(6));
    return (F)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }
  static float sum(F x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
};

}  // namespace flashmla::FLASHMLA_ISA
