// Decode, and the product of each head's result with a weight of its own (MLA: W_UV).
//
// The product is a second stage, a head for all sequences at a time, so that every weight is read once: inside the
// tasks of the attention each sequence would read all of them again. What is attended to lies between the stages in the
// type of the queries, [h_q, b * s_q, d_v], in memory that the calling thread keeps.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/failure.h"

namespace flashmla {
namespace {

thread_local Arena latents, scratch;

constexpr int64_t kColumnStep = 64;   // where there are more threads than heads, columns are divided, by this many
constexpr int64_t kSerial = 1 << 16;  // multiply-adds that cost less than waking a thread

// The second stage. Its unit of work is a head's block of columns; all heads of a block come before the next block.
class Product {
public:
  Product(const Kernels& kernels, const FlashmlaBmm& call, int64_t num_threads) : kernels_(kernels), call_(call) {
    const int64_t steps = (call.n + kColumnStep - 1) / kColumnStep;
    const int64_t blocks = std::min((num_threads + call.batch - 1) / call.batch, steps);
    columns_ = (steps + blocks - 1) / blocks * kColumnStep;
  }

  int64_t units() const { return call_.batch * ((call_.n + columns_ - 1) / columns_); }

  void run(int64_t begin, int64_t end) {
    char* memory = scratch.reserve(size_t(kernels_.bmm_scratch_bytes(call_)));
    if (memory == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t unit = begin, last; unit < end; unit = last) {
      const int64_t first = unit / call_.batch * call_.batch;
      last = std::min(end, first + call_.batch);
      kernels_.bmm_run(of_columns(unit / call_.batch * columns_), unit - first, last - first, memory);
    }
  }

  std::atomic<bool> out_of_memory{false};

private:
  FlashmlaBmm of_columns(int64_t column) const {
    const int64_t size = call_.dtype == FLASHMLA_F32 ? 4 : 2;
    FlashmlaBmm part = call_;
    part.n = std::min(columns_, call_.n - column);
    part.weight = static_cast<const char*>(call_.weight) + column * call_.weight_stride[2] * size;
    part.out = static_cast<char*>(call_.out) + column * size;
    return part;
  }

  const Kernels& kernels_;
  const FlashmlaBmm& call_;
  int64_t columns_;
};

int64_t tokens(const FlashmlaDecode& call) { return call.cu_seqlens_q ? call.t_q : call.b * call.s_q; }

FlashmlaBmm product_of(const FlashmlaDecode& attention, const FlashmlaUp& up) {
  FlashmlaBmm call{};
  call.dtype = attention.dtype;
  call.batch = attention.h_q, call.m = tokens(attention), call.k = attention.d_v, call.n = up.d_up;
  call.a = attention.out, call.a_stride[0] = attention.out_stride[2], call.a_stride[1] = attention.d_v;
  call.weight = up.weight, call.weight_along_k = up.weight_along_k;
  for (int i = 0; i < 3; i++) call.weight_stride[i] = up.weight_stride[i];
  call.out = up.out, call.out_stride[0] = up.d_up, call.out_stride[1] = attention.h_q * up.d_up;
  return call;
}

}  // namespace
}  // namespace flashmla

using namespace flashmla;

extern "C" int flashmla_decode_up(const FlashmlaDecode* attention, const FlashmlaUp* up, const int32_t* schedule,
                                  int64_t schedule_numel, const FlashmlaRuntime* runtime, char* message) {
  FlashmlaDecode call = *attention;
  const int64_t rows = tokens(call), size = call.dtype == FLASHMLA_F32 ? 4 : 2;
  call.out = latents.reserve(size_t(std::max<int64_t>(call.h_q * rows * call.d_v * size, 1)));
  if (call.out == nullptr) return out_of_memory(message, "decode_up");
  call.out_stride[0] = call.s_q * call.d_v, call.out_stride[1] = call.d_v, call.out_stride[2] = rows * call.d_v;
  if (flashmla_decode(&call, schedule, schedule_numel, runtime, message)) return 1;
  if (rows == 0 || call.h_q == 0) return 0;

  const FlashmlaBmm product_call = product_of(call, *up);
  Product product(kernels(), product_call, runtime->num_threads);
  const FlashmlaBody body = [](int64_t begin, int64_t end, void* context) {
    static_cast<Product*>(context)->run(begin, end);
  };
  if (call.h_q * rows * call.d_v * up->d_up < kSerial || runtime->num_threads <= 1) {
    body(0, product.units(), &product);
  } else {
    runtime->parallel(product.units(), body, &product);
  }
  return product.out_of_memory ? out_of_memory(message, "decode_up") : 0;
}
