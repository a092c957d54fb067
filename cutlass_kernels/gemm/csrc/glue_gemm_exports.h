// The exported functions of linear and batched kernels. Expects `Device`, `arguments_of` and `legal`.
#pragma once

FLASHMLA_EXPORT int flashmla_gemm_abi() { return FLASHMLA_GEMM_ABI; }

FLASHMLA_EXPORT const char* flashmla_gemm_status(int code) { return flashmla_glue::status(code); }

// Whether the kernel takes the problem: alignment, batch, splits.
FLASHMLA_EXPORT int flashmla_gemm_can_run(const FlashmlaGemm* call) {
  return flashmla_glue::has_device() ? legal(*call) : FLASHMLA_GEMM_NO_DEVICE;
}

// CUTLASS answers 0 where it cannot ask a device, which would be taken for "none needed".
FLASHMLA_EXPORT int flashmla_gemm_workspace(const FlashmlaGemm* call, size_t* bytes) {
  *bytes = 0;
  if (!flashmla_glue::has_device()) return FLASHMLA_GEMM_NO_DEVICE;
  *bytes = Device::get_workspace_size(arguments_of(*call));
  return 0;
}

FLASHMLA_EXPORT int flashmla_gemm_run(const FlashmlaGemm* call, cudaStream_t stream) {
  if (!flashmla_glue::has_device()) return FLASHMLA_GEMM_NO_DEVICE;
  if (const int refused = legal(*call)) return refused;
  const auto arguments = arguments_of(*call);
  if (Device::get_workspace_size(arguments) > call->workspace_bytes) return FLASHMLA_GEMM_WORKSPACE_TOO_SMALL;
  Device device;
  const cutlass::Status ready = device.initialize(arguments, call->workspace, stream);
  return int(ready == cutlass::Status::kSuccess ? device.run(stream) : ready);
}
