// Glue of grouped kernels (CUTLASS 2.x). Expects `Kernel`.
//
// Sizes of groups are known only on the device, and asking for them would synchronise. A small kernel therefore turns
// offsets into CUTLASS's arrays of problems in the workspace, on the same stream, and the blocks schedule themselves.
#pragma once

using Device = cutlass::gemm::device::GemmGrouped<Kernel>;

// The arrays that CUTLASS reads, one entry a group, in one piece of memory.
struct Problems {
  Kernel::ElementA** a;
  Kernel::ElementB** b;
  Kernel::ElementC** d;
  int64_t *lda, *ldb, *ldd;
  cutlass::gemm::GemmCoord* sizes;

  static constexpr size_t kBytes = 6 * 8 + sizeof(cutlass::gemm::GemmCoord);

  __host__ __device__ Problems(void* workspace, int64_t groups) {
    int64_t* words = static_cast<int64_t*>(workspace);
    a = reinterpret_cast<Kernel::ElementA**>(words);
    b = reinterpret_cast<Kernel::ElementB**>(words + groups);
    d = reinterpret_cast<Kernel::ElementC**>(words + 2 * groups);
    lda = words + 3 * groups, ldb = words + 4 * groups, ldd = words + 5 * groups;
    sizes = reinterpret_cast<cutlass::gemm::GemmCoord*>(words + 6 * groups);
  }
};

// One thread a group. Whatever the offsets are, a run lies within the rows: bad ones write nowhere else.
__global__ void describe_groups(const FlashmlaGroupedGemm call) {
  const int64_t g = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (g >= call.groups) return;
  const Problems problems(call.workspace, call.groups);
  const auto within = [](int64_t x, int64_t least, int64_t most) { return x < least ? least : x > most ? most : x; };
  const int64_t first = within(call.offsets[g], 0, call.rows);
  const int64_t rows = within(call.offsets[g + 1], first, call.rows) - first;
  problems.a[g] = static_cast<Kernel::ElementA*>(const_cast<void*>(call.a)) + first * call.a_stride;
  problems.b[g] = static_cast<Kernel::ElementB*>(const_cast<void*>(call.weight)) + g * call.weight_stride[1];
  problems.d[g] = static_cast<Kernel::ElementC*>(call.d) + first * call.d_stride;
  problems.lda[g] = call.a_stride, problems.ldb[g] = call.weight_stride[0], problems.ldd[g] = call.d_stride;
  problems.sizes[g] = cutlass::gemm::GemmCoord(int(rows), int(call.n), int(call.k));
}

static int legal(const FlashmlaGroupedGemm& call) {
  using flashmla_glue::countable;
  if (!countable(call.groups) || !countable(call.rows) || !countable(call.n) || !countable(call.k)) {
    return int(cutlass::Status::kErrorInvalidProblem);
  }
  const bool aligned = call.k % Kernel::kAlignmentA == 0 && call.n % Kernel::kAlignmentC == 0 &&
                       call.a_stride % Kernel::kAlignmentA == 0 && call.weight_stride[0] % Kernel::kAlignmentB == 0 &&
                       call.weight_stride[1] % Kernel::kAlignmentB == 0 && call.d_stride % Kernel::kAlignmentC == 0;
  const uintptr_t bits = uintptr_t(call.a) | uintptr_t(call.weight) | uintptr_t(call.d);
  return int(aligned && bits % 16 == 0 ? cutlass::Status::kSuccess : cutlass::Status::kErrorMisalignedOperand);
}

FLASHMLA_EXPORT int flashmla_gemm_abi() { return FLASHMLA_GEMM_ABI; }

FLASHMLA_EXPORT const char* flashmla_gemm_status(int code) { return flashmla_glue::status(code); }

FLASHMLA_EXPORT int flashmla_grouped_gemm_can_run(const FlashmlaGroupedGemm* call) {
  return flashmla_glue::has_device() ? legal(*call) : FLASHMLA_GEMM_NO_DEVICE;
}

FLASHMLA_EXPORT int flashmla_grouped_gemm_workspace(const FlashmlaGroupedGemm* call, size_t* bytes) {
  *bytes = Problems::kBytes * size_t(call->groups);
  return 0;
}

FLASHMLA_EXPORT int flashmla_grouped_gemm_run(const FlashmlaGroupedGemm* call, cudaStream_t stream) {
  if (!flashmla_glue::has_device()) return FLASHMLA_GEMM_NO_DEVICE;
  if (const int refused = legal(*call)) return refused;
  if (call->workspace_bytes < Problems::kBytes * size_t(call->groups)) return FLASHMLA_GEMM_WORKSPACE_TOO_SMALL;
  const int groups = int(call->groups);
  describe_groups<<<(groups + 127) / 128, 128, 0, stream>>>(*call);
  if (cudaGetLastError() != cudaSuccess) return int(cutlass::Status::kErrorInternal);

  const Problems problems(call->workspace, groups);
  const int blocks = flashmla_glue::multiprocessors(call->sm_count) * Device::maximum_active_blocks();
  const Device::Arguments arguments(problems.sizes, groups, blocks, {call->alpha, 0.0f}, problems.a, problems.b,
                                    problems.d, problems.d, problems.lda, problems.ldb, problems.ldd, problems.ldd);
  Device device;
  const cutlass::Status ready = device.initialize(arguments, nullptr, stream);
  return int(ready == cutlass::Status::kSuccess ? device.run(stream) : ready);
}
