// D = A B^T in bfloat16 on sm_90a: CUTLASS 3.x, TMA in and out, warp-specialised wgmma, clusters of CLUSTER CTAs.
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

using Element = cutlass::bfloat16_t;
using Tile = cute::Shape<cute::_128, cute::_64, cute::_64>;
using Cluster = cute::Shape<cute::Int<CLUSTER>, cute::_1, cute::_1>;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;

using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    float, float, void, Row, 8, Element, Row, 8, cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, 8, Element, Column, 8, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

extern "C" int gemm(int m, int n, int k, int, const void* a, const void* b, void* d, void* workspace,
                    cudaStream_t stream) {
  auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {m, k, 1});
  auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {n, k, 1});
  auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {m, n, 1});
  cutlass::KernelHardwareInfo hardware;
  cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, 0);
  Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                            {m, n, k, 1},
                            {static_cast<const Element*>(a), stride_a, static_cast<const Element*>(b), stride_b},
                            {{1.f, 0.f}, nullptr, stride_d, static_cast<Element*>(d), stride_d},
                            hardware};
  Gemm kernel;
  if (auto status = Gemm::can_implement(arguments); status != cutlass::Status::kSuccess) return int(status);
  if (auto status = kernel.initialize(arguments, workspace, stream); status != cutlass::Status::kSuccess)
    return int(status);
  return int(kernel.run(stream));
}
