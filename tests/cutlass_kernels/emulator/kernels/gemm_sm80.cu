// D = A B^T in bfloat16 on sm_80: CUTLASS 2.x, three stages of cp.async, mma.sync.
#include "cutlass/bfloat16.h"
#include "cutlass/gemm/device/gemm_universal.h"

using Element = cutlass::bfloat16_t;
using Gemm =
    cutlass::gemm::device::GemmUniversal<Element, cutlass::layout::RowMajor, Element, cutlass::layout::ColumnMajor,
                                         Element, cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp,
                                         cutlass::arch::Sm80, cutlass::gemm::GemmShape<64, 64, 32>,
                                         cutlass::gemm::GemmShape<32, 32, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
                                         cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
                                         cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3, 8, 8>;

extern "C" int gemm(int m, int n, int k, int splits, const void* a, const void* b, void* d, void* workspace,
                    cudaStream_t stream) {
  Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k}, splits, {1.f, 0.f}, a, b, d, d, 0, 0, 0,
                            0, k, k, n, n);
  Gemm kernel;
  if (auto status = kernel.can_implement(arguments); status != cutlass::Status::kSuccess) return int(status);
  if (auto status = kernel.initialize(arguments, workspace, stream); status != cutlass::Status::kSuccess)
    return int(status);
  return int(kernel.run(stream));
}
