// The AVX-512 BF16 kernels (their tiles, panels, pairs and packing) on portable vectors: slow, exact in the same
// places, and able to run anywhere. What it does not run is the handful of intrinsics in avx512.h.
#pragma once

#include "flashmla/isa/portable.h"

namespace flashmla::FLASHMLA_ISA {

struct Emulated : Portable<16, true> {
  static constexpr int qk_m = 8, qk_n = 2, pv_m = 8, pv_n = 3, pair_m = 16, pair_n = 1;
  static constexpr int gemm_m = 6, gemm_group = 4, gemm_sums = 24, panel_m = 12, panel_n = 2;
  static constexpr int block = 128, step = 24;
};

}  // namespace flashmla::FLASHMLA_ISA
