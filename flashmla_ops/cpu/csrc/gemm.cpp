// The small products in parallel: columns of out for gemm, batch entries for bmm.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/failure.h"
#include "flashmla/isas.h"

namespace flashmla {
namespace {

thread_local Arena arena;

constexpr int64_t kColumnStep = 16;   // columns of out that a thread takes a multiple of
constexpr int64_t kSerial = 1 << 16;  // multiply-adds that cost less than waking a thread

struct GemmPass {
  const Kernels& kernels;
  const FlashmlaGemm& call;
  int64_t row, rows;
  const char* packed;
};

struct EpiloguePass {
  const Kernels& kernels;
  const FlashmlaGemm& call;
  const void* product;
  FlashmlaDType dtype;
};

struct BmmPass {
  const Kernels& kernels;
  const FlashmlaBmm& call;
  std::atomic<bool> out_of_memory{false};
};

}  // namespace
}  // namespace flashmla

using namespace flashmla;

extern "C" int flashmla_gemm(const FlashmlaGemm* call, const FlashmlaRuntime* runtime, char* message) {
  const Kernels& active = kernels();
  char* packed = arena.reserve(size_t(active.gemm_packed_bytes(*call)));
  if (packed == nullptr) return out_of_memory(message, "gemm");
  const int64_t rows = active.gemm_rows(*call);
  for (int64_t row = 0; row < call->m; row += rows) {
    GemmPass pass{active, *call, row, std::min(rows, call->m - row), packed};
    active.gemm_pack(*call, pass.row, pass.rows, packed);
    const FlashmlaBody body = [](int64_t begin, int64_t end, void* context) {
      const GemmPass& p = *static_cast<const GemmPass*>(context);
      p.kernels.gemm_run(p.call, p.row, p.rows, p.packed, begin * kColumnStep, std::min(end * kColumnStep, p.call.n));
    };
    const int64_t blocks = (call->n + kColumnStep - 1) / kColumnStep;
    if (pass.rows * call->n * call->k < kSerial || runtime->num_threads <= 1) {
      body(0, blocks, &pass);
    } else {
      runtime->parallel(blocks, body, &pass);
    }
  }
  return 0;
}

extern "C" int flashmla_multiplies(FlashmlaDType dtype) {
  return dtype == FLASHMLA_F32 || (dtype == FLASHMLA_BF16 && multiplies_bf16());
}

extern "C" int flashmla_gemm_epilogue(const FlashmlaGemm* call, const void* product, FlashmlaDType product_dtype,
                                      const FlashmlaRuntime* runtime, char*) {
  EpiloguePass pass{kernels(), *call, product, product_dtype};
  runtime->parallel(
      call->m,
      [](int64_t begin, int64_t end, void* context) {
        const EpiloguePass& p = *static_cast<const EpiloguePass*>(context);
        p.kernels.gemm_epilogue(p.call, p.product, p.dtype, begin, end);
      },
      &pass);
  return 0;
}

extern "C" int flashmla_bmm(const FlashmlaBmm* call, const FlashmlaRuntime* runtime, char* message) {
  BmmPass pass{kernels(), *call, {}};
  const FlashmlaBody body = [](int64_t begin, int64_t end, void* context) {
    BmmPass& p = *static_cast<BmmPass*>(context);
    char* scratch = arena.reserve(size_t(p.kernels.bmm_scratch_bytes(p.call)));
    if (scratch == nullptr) {
      p.out_of_memory = true;
      return;
    }
    p.kernels.bmm_run(p.call, begin, end, scratch);
  };
  if (call->batch * call->m * call->n * call->k < kSerial || runtime->num_threads <= 1) {
    body(0, call->batch, &pass);
  } else {
    runtime->parallel(call->batch, body, &pass);
  }
  return pass.out_of_memory ? out_of_memory(message, "bmm") : 0;
}
