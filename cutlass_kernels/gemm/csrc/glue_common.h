// What the glue of every kernel shares. Included by generated sources only.
#pragma once

#include <cuda_runtime_api.h>

#include "cutlass/cutlass.h"
#include "flashmla_gemm.h"

#define FLASHMLA_EXPORT extern "C" __attribute__((visibility("default")))

namespace flashmla_glue {

inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

inline int multiprocessors(int wanted) {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return wanted > 0 && wanted < count ? wanted : count;
}

// CUTLASS counts in 32 bits, and a launch needs a block at least.
inline bool countable(int64_t extent) { return 1 <= extent && extent <= INT32_MAX; }

inline bool countable(const FlashmlaGemm& call) {
  return countable(call.m) && countable(call.n) && countable(call.k) && countable(call.batch);
}

// Threads move 16 bytes at a time. CUTLASS checks extents only: pointers and strides are up to us.
inline bool aligned(const void* pointer, const int64_t (&stride)[2], size_t bytes) {
  return (uintptr_t(pointer) | uintptr_t(stride[0] * int64_t(bytes)) | uintptr_t(stride[1] * int64_t(bytes))) % 16 == 0;
}

template <class Kernel, class Output>
bool aligned(const FlashmlaGemm& call) {
  return aligned(call.a, call.a_stride, sizeof(typename Kernel::ElementA)) &&
         aligned(call.weight, call.weight_stride, sizeof(typename Kernel::ElementB)) &&
         aligned(call.c, call.c_stride, sizeof(Output)) && aligned(call.d, call.d_stride, sizeof(Output)) &&
         (uintptr_t(call.bias) | uintptr_t(call.col_scale)) % 16 == 0;
}

inline const char* status(int code) {
  switch (code) {
    case FLASHMLA_GEMM_NO_DEVICE:
      return "no CUDA device";
    case FLASHMLA_GEMM_WORKSPACE_TOO_SMALL:
      return "the workspace is smaller than flashmla_gemm_workspace says";
    default:
      return cutlass::cutlassGetStatusString(cutlass::Status(code));
  }
}

}  // namespace flashmla_glue
