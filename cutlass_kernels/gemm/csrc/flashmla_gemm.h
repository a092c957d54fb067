// The C ABI of a generated kernel: what `cutlass_kernels/abi.py` mirrors. One shared library holds one kernel.
//
// Nothing here allocates or synchronises, and nothing runs on the default stream. Pointers are device pointers; strides
// count elements, and the innermost dimension is contiguous. A function returns 0 (cutlass::Status::kSuccess) or a
// status that flashmla_gemm_status names.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define FLASHMLA_GEMM_ABI 2
// Beside cutlass::Status: there is no CUDA device, so sizes that depend on one are unknown.
#define FLASHMLA_GEMM_NO_DEVICE 100
#define FLASHMLA_GEMM_WORKSPACE_TOO_SMALL 101

// d[batch, m, n] = epilogue(a[batch, m, k] weight), see cutlass_kernels/epilogue.py.
typedef struct FlashmlaGemm {
  int64_t m, n, k, batch;
  const void* a;
  const void* weight;  // [n, k], or [k, n] in the batched family
  const void* c;       // null only if the epilogue does not read it (plain: beta 0)
  void* d;
  // Row, then batch. On sm_80 a row stride of 0 in c repeats one row: a bias for the plain epilogue.
  int64_t a_stride[2], weight_stride[2], c_stride[2], d_stride[2];
  const void* bias;        // [n] or null
  const float* row_scale;  // [m] or null
  const float* col_scale;  // [n] or null
  float alpha, beta;
  int32_t splits;    // blocks that share the sums of one tile, one after the other; 1 unless the kernel splits
  int32_t sm_count;  // multiprocessors that a persistent kernel may fill; 0: all
  void* workspace;
  size_t workspace_bytes;
} FlashmlaGemm;

// d[rows of g] = alpha * a[rows of g] weight[g]^T for each group g; its rows are offsets[g] to offsets[g + 1]. Offsets
// are read on the device and trusted for nothing: of what they say, only rows that exist are read and written.
typedef struct FlashmlaGroupedGemm {
  int64_t groups, rows, n, k;
  const void* a;       // [rows, k]
  const void* weight;  // [groups, n, k]
  void* d;             // [rows, n]
  int64_t a_stride, weight_stride[2], d_stride;
  const int32_t* offsets;  // [groups + 1], on the device: from 0 to rows, non-decreasing
  float alpha;
  int32_t sm_count;
  void* workspace;
  size_t workspace_bytes;
} FlashmlaGroupedGemm;
