// Glue of linear and batched kernels for sm_90a (CUTLASS 3.x). Expects `Kernel`, `Output`, `kBatches` and
// `epilogue_arguments(call)` in the including namespace.
#pragma once

using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// The stride of one operand: contiguous along k or n, `stride[0]` along the other, `stride[1]` from batch to batch.
template <class Stride>
static Stride stride_of(const int64_t (&stride)[2]) {
  Stride result{};
  if constexpr (!cute::is_static<cute::remove_cvref_t<decltype(cute::get<0>(result))>>::value) {
    cute::get<0>(result) = stride[0];
  } else {
    cute::get<1>(result) = stride[0];
  }
  if constexpr (!cute::is_static<cute::remove_cvref_t<decltype(cute::get<2>(result))>>::value) {
    cute::get<2>(result) = stride[1];
  }
  return result;
}

static Device::Arguments arguments_of(const FlashmlaGemm& call) {
  cutlass::KernelHardwareInfo hardware;
  cudaGetDevice(&hardware.device_id);
  hardware.sm_count = flashmla_glue::multiprocessors(call.sm_count);
  // A TMA descriptor of c is made even where it is not read, and it cannot be made of a null pointer.
  const bool reads_c = call.c != nullptr;
  return Device::Arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                           {int(call.m), int(call.n), int(call.k), int(call.batch)},
                           {static_cast<const Kernel::ElementA*>(call.a), stride_of<Kernel::StrideA>(call.a_stride),
                            static_cast<const Kernel::ElementB*>(call.weight),
                            stride_of<Kernel::StrideB>(call.weight_stride)},
                           {epilogue_arguments(call), static_cast<const Kernel::ElementC*>(reads_c ? call.c : call.d),
                            stride_of<Kernel::StrideC>(reads_c ? call.c_stride : call.d_stride),
                            static_cast<Kernel::ElementD*>(call.d), stride_of<Kernel::StrideD>(call.d_stride)},
                           hardware};
}

// Whether an operand repeats itself: a TMA descriptor is not known to take a stride of 0.
static bool repeats(const FlashmlaGemm& call) {
  const bool rows =
      (call.m > 1 && (call.a_stride[0] == 0 || (call.c && call.c_stride[0] == 0))) || call.weight_stride[0] == 0;
  const bool batches =
      call.batch > 1 && (call.a_stride[1] == 0 || call.weight_stride[1] == 0 || (call.c && call.c_stride[1] == 0));
  return rows || batches;
}

static int legal(const FlashmlaGemm& call) {
  if (!flashmla_glue::countable(call)) return int(cutlass::Status::kErrorInvalidProblem);
  if ((call.batch > 1 && !kBatches) || call.splits != 1 || repeats(call)) {
    return int(cutlass::Status::kErrorNotSupported);
  }
  if (!flashmla_glue::aligned<Kernel, Output>(call)) return int(cutlass::Status::kErrorMisalignedOperand);
  return int(Kernel::can_implement(arguments_of(call)) ? cutlass::Status::kSuccess
                                                       : cutlass::Status::kErrorMisalignedOperand);
}
