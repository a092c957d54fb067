// Glue of linear and batched kernels for sm_80 (CUTLASS 2.x). Expects `Kernel`, `Output`, `kSplits`, `kBatches` and
// `epilogue_arguments(call)` in the including namespace.
//
// GemmUniversalBase, not GemmUniversalAdapter: with a row-major C the adapter swaps the operands of what is emitted as
// a kernel (it expects the swap that its own type-level map makes), and stores d transposed.
#pragma once

using Device = cutlass::gemm::device::GemmUniversalBase<Kernel>;

static Device::Arguments arguments_of(const FlashmlaGemm& call) {
  using cutlass::gemm::GemmUniversalMode;
  const bool batched = call.batch > 1;
  const int count = int(batched ? call.batch : call.splits);
  return Device::Arguments(batched ? GemmUniversalMode::kBatched : GemmUniversalMode::kGemm,
                           {int(call.m), int(call.n), int(call.k)}, count, epilogue_arguments(call), call.a,
                           call.weight, call.c ? call.c : call.d, call.d, call.a_stride[1], call.weight_stride[1],
                           call.c_stride[1], call.d_stride[1], call.a_stride[0], call.weight_stride[0],
                           call.c_stride[0], call.d_stride[0]);
}

static int legal(const FlashmlaGemm& call) {
  if (!flashmla_glue::countable(call)) return int(cutlass::Status::kErrorInvalidProblem);
  if (call.splits < 1 || (call.batch > 1 && (!kBatches || call.splits > 1)) || (call.splits > 1 && !kSplits)) {
    return int(cutlass::Status::kErrorNotSupported);
  }
  if (!flashmla_glue::aligned<Kernel, Output>(call)) return int(cutlass::Status::kErrorMisalignedOperand);
  // Of the device, not the kernel: it also knows whether the grid can be launched.
  return int(Device::can_implement(arguments_of(call)));
}
