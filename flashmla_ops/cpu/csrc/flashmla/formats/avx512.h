// Codes to bf16 where there are permutations of 16-bit words: 32 elements at a time, for the same bits as the loops
// that formats have for any processor.
#pragma once

#include "flashmla/dtypes.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define FLASHMLA_WORDS 1

#include <immintrin.h>

namespace flashmla::FLASHMLA_ISA {

inline __m512i words_of_bytes(const uint8_t* codes) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}

// N e4m3 numbers times 2^power, -100 <= power <= 100: no result is subnormal or infinite. A number of e4m3 is one of
// bf16 with other exponents, but for the eight that are multiples of 2^-9, which a table has.
template <int64_t N>
void e4m3_to_bf16(const uint8_t* codes, int power, bf16* out) {
  static_assert(N % 32 == 0);
  // n 2^-9 for n < 8
  const __m512i small = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 118 << 7, 119 << 7, 119 << 7 | 64, 120 << 7, 120 << 7 | 32, 120 << 7 | 64, 120 << 7 | 96));
  const __m512i magnitudes = _mm512_set1_epi16(0x7f), rebase = _mm512_set1_epi16(120 << 7);
  const __m512i nan = _mm512_set1_epi16(0x7fc0), shift = _mm512_set1_epi16(int16_t(power * 128));
  for (int64_t i = 0; i < N; i += 32) {
    const __m512i code = words_of_bytes(codes + i), magnitude = _mm512_and_si512(code, magnitudes);
    __m512i x = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), rebase);
    x = _mm512_mask_permutexvar_epi16(x, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, small);
    x = _mm512_mask_add_epi16(x, _mm512_test_epi16_mask(magnitude, magnitude), x, shift);
    x = _mm512_mask_mov_epi16(x, _mm512_cmpeq_epi16_mask(magnitude, magnitudes), nan);
    const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(magnitudes, code), 8);
    _mm512_storeu_si512(out + i, _mm512_or_si512(x, sign));
  }
}

// N codes of four bits, the even one in the low half of a byte: numbers[code] times the scale.
template <int64_t N>
void nibbles_to_bf16(const uint8_t* codes, const float (&numbers)[16], float scale, bf16* out) {
  static_assert(N % 16 == 0);
  const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(numbers), _mm512_set1_ps(scale));
  const __m256i table = (__m256i)_mm512_cvtneps_pbh(products);
  for (int64_t i = 0; i < N; i += 16) {
    // A byte becomes two words with a nibble each in their lowest four bits, which alone count.
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
    const __m256i nibbles = _mm256_or_si256(bytes, _mm256_slli_epi32(bytes, 12));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permutexvar_epi16(nibbles, table));
  }
}

}  // namespace flashmla::FLASHMLA_ISA
#endif
