// Stands in for the compiler's immintrin.h, so that csrc/flashmla/isa/avx512.h runs on a processor without AVX-512:
// SIMDe (https://github.com/simd-everywhere/simde) computes every intrinsic lane by lane. The functions below are the
// ones that its release in Debian 12 lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_NATIVE
#include <simde/x86/avx512.h>
#include <simde/x86/avx512/dpbf16.h>
#include <simde/x86/f16c.h>

#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT 0
#endif

// A vector of N lanes f(lane) from the first N lanes of another.
template <int N, class ToLane, class FromLane, class To, class From, class F>
inline To map_lanes(From from, F f) {
  static_assert(sizeof(To) == N * sizeof(ToLane) && sizeof(From) == N * sizeof(FromLane));
  FromLane in[N];
  ToLane out[N];
  memcpy(in, &from, sizeof in);
  for (int i = 0; i < N; i++) out[i] = f(in[i]);
  To to;
  memcpy(&to, out, sizeof out);
  return to;
}

inline uint16_t missing_round_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline simde__m512 missing_cvtph_ps(simde__m256i halves) {
  return map_lanes<16, float, simde_float16, simde__m512>(halves,
                                                          [](simde_float16 x) { return simde_float16_to_float32(x); });
}
inline simde__m256i missing_cvtps_ph(simde__m512 floats) {
  return map_lanes<16, simde_float16, float, simde__m256i>(floats,
                                                           [](float x) { return simde_float16_from_float32(x); });
}
inline simde__m256i missing_cvtneps_pbh_512(simde__m512 floats) {
  return map_lanes<16, uint16_t, float, simde__m256i>(floats, missing_round_to_bf16);
}
inline simde__m128i missing_cvtneps_pbh_256(simde__m256 floats) {
  return map_lanes<8, uint16_t, float, simde__m128i>(floats, missing_round_to_bf16);
}
inline simde__m512i missing_cvtne2ps_pbh(simde__m512 high, simde__m512 low) {
  const simde__m256i halves[] = {missing_cvtneps_pbh_512(low), missing_cvtneps_pbh_512(high)};
  simde__m512i both;
  memcpy(&both, halves, sizeof both);
  return both;
}
inline simde__m512i missing_cvtepu16_epi32(simde__m256i x) {
  return map_lanes<16, uint32_t, uint16_t, simde__m512i>(x, [](uint16_t lane) { return uint32_t{lane}; });
}
inline simde__m512i missing_cvtepi8_epi32(simde__m128i x) {
  return map_lanes<16, int32_t, int8_t, simde__m512i>(x, [](int8_t lane) { return int32_t{lane}; });
}
inline simde__m512 missing_cvtepi32_ps(simde__m512i x) {
  return map_lanes<16, float, int32_t, simde__m512>(x, [](int32_t lane) { return float(lane); });
}
inline float missing_reduce_add_ps(simde__m512 floats) {
  float sum = 0;
  map_lanes<16, float, float, simde__m512>(floats, [&](float lane) { return sum += lane; });
  return sum;
}

#define _mm512_cvtph_ps(x) missing_cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding) missing_cvtps_ph(x)
#define _mm512_cvtneps_pbh(x) missing_cvtneps_pbh_512(x)
#define _mm256_cvtneps_pbh(x) missing_cvtneps_pbh_256(x)
#define _mm512_cvtne2ps_pbh(high, low) missing_cvtne2ps_pbh(high, low)
#define _mm512_cvtepu16_epi32(x) missing_cvtepu16_epi32(x)
#define _mm512_cvtepi8_epi32(x) missing_cvtepi8_epi32(x)
#define _mm512_cvtepi32_ps(x) missing_cvtepi32_ps(x)
#define _mm512_reduce_add_ps(x) missing_reduce_add_ps(x)
