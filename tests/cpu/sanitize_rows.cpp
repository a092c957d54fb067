// Attention and append_ over caches of exactly their size, for the address sanitizer: every format, indices that name
// nothing, first and last rows. Ends with 0, or where the sanitizer ends it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#define FLASHMLA_ISA generic
#include "kernels_attention.cpp"

#include "flashmla/append_quantized.h"

namespace {

using namespace flashmla;

constexpr int64_t kPages = 3, kPageSize = 5, kSlots = kPages * kPageSize, kTokens = 2;
const FlashmlaRuntime kAlone = {1, [](int64_t n, FlashmlaBody body, void* context) { body(0, n, context); }};

void must(int failed, const char* message) {
  if (!failed) return;
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

// A cache of one format: native float, or bytes, in an allocation of its own.
struct Cache {
  int32_t format;
  int64_t d;
  std::vector<uint8_t> bytes;

  explicit Cache(int32_t number)
      : format(number), d(number ? kRowFormats[number].elements : 40), bytes(size_t(kSlots * row_bytes())) {}
  int64_t row_bytes() const { return format ? kRowFormats[format].bytes : 4 * d; }
  FlashmlaCache view() const {
    const int64_t unit = format ? 1 : 4, row = row_bytes() / unit;
    const int64_t tail = format ? kRowFormats[format].tail : 0;
    return {bytes.data(), kPageSize * row, row - tail, row, d};
  }
};

void append(Cache& cache) {
  const std::vector<float> rows(size_t(3 * cache.d), 0.5f);
  const int64_t slots[3] = {0, -1, kSlots - 1};
  const FlashmlaCache view = cache.view();
  const int64_t unit = cache.format ? 1 : 4;
  FlashmlaAppend to{};
  to.cache = reinterpret_cast<char*>(cache.bytes.data()), to.rows = reinterpret_cast<const char*>(rows.data());
  to.page_bytes = view.page_stride * unit, to.token_bytes = view.token_stride * unit, to.head_bytes = cache.row_bytes();
  to.row_bytes = to.row_head_bytes = 4 * cache.d, to.element_bytes = to.element_size = 4;
  to.h_kv = 1, to.d = cache.d, to.n_pages = kPages, to.page_size = kPageSize;
  char message[FLASHMLA_MESSAGE];
  must(cache.format ? flashmla_append_quantized(&to, cache.format, FLASHMLA_F32, slots, 1, 3, &kAlone, message)
                    : flashmla_append(&to, 1, slots, 1, 3, &kAlone, message),
       message);
}

void attend(const Cache& cache, int64_t h_q) {
  const int64_t d_v = cache.d < 512 ? cache.d : 512;
  const std::vector<float> q(size_t(kTokens * h_q * cache.d), 0.25f);
  std::vector<float> out(size_t(kTokens * h_q * d_v)), lse(size_t(kTokens * h_q)), max_logits(lse.size());
  FlashmlaDecode call{};
  call.b = kTokens, call.s_q = 1, call.h_q = h_q, call.h_kv = 1, call.d_qk = cache.d, call.d_v = d_v;
  call.softmax_scale = 0.1f, call.levels = 3, call.row_format = cache.format;
  call.q = q.data(), call.q_stride[0] = call.q_stride[1] = h_q * cache.d, call.q_stride[2] = cache.d;
  call.q_stride[3] = 1;
  call.kv = cache.view(), call.n_pages = kPages, call.page_size = kPageSize;
  call.out = out.data(), call.out_stride[0] = call.out_stride[1] = h_q * d_v, call.out_stride[2] = d_v;
  call.lse = lse.data(), call.lse_stride[0] = h_q, call.lse_stride[1] = 1;
  char message[FLASHMLA_MESSAGE];

  const std::vector<int32_t> table = {2, 0, 1, 1, 2, 0}, lengths = {int32_t(kSlots), 11};
  FlashmlaDecode dense = call;
  dense.block_table = table.data(), dense.block_table_stride[0] = dense.max_pages = 3, dense.block_table_stride[1] = 1;
  dense.cache_seqlens = lengths.data(), dense.cache_seqlens_stride = 1;
  must(flashmla_decode(&dense, nullptr, 0, &kAlone, message), message);
  dense.window = 5, dense.softcap = 2;
  must(flashmla_decode(&dense, nullptr, 0, &kAlone, message), message);
  dense.batch_invariant = dense.causal = 1;
  const std::vector<int32_t> bounds = {0, kTokens, kTokens};
  dense.cu_seqlens_q = bounds.data(), dense.cu_seqlens_q_stride = 1, dense.t_q = kTokens;
  must(flashmla_decode(&dense, nullptr, 0, &kAlone, message), message);

  constexpr int32_t kLast = int32_t(kSlots - 1);
  const std::vector<int32_t> indices = {0,     kLast, -1, INT32_MIN, kLast + 1, INT32_MAX, -kLast, 2147480000,
                                        kLast, 0,     -1, INT32_MIN, kLast + 1, INT32_MAX, -kLast, 2147480000};
  FlashmlaSparse sparse{};
  sparse.attention = call, sparse.attention.max_logits = max_logits.data(), sparse.n_sources = 2;
  for (FlashmlaSource& source : sparse.sources) {
    source.kv = cache.view(), source.row_format = cache.format;
    source.n_pages = kPages, source.page_size = kPageSize;
    source.indices = indices.data(), source.topk = 8, source.indices_stride[0] = 8, source.indices_stride[3] = 1;
  }
  for (const int64_t threads : {1, 7}) {  // whole queries, and pieces of them
    const FlashmlaRuntime runtime = {threads, kAlone.parallel};
    must(flashmla_sparse(&sparse, &runtime, message), message);
  }
}

}  // namespace

int main() {
  static Kernels kernels{};
  static_cast<AttentionKernels&>(kernels) = FLASHMLA_ISA::attention_kernels, kernels.name = "generic";
  if (flashmla_use(&kernels)) return 2;
  for (int32_t number = 0; number < int32_t(std::size(kRowFormats)); number++) {
    Cache cache(number);
    append(cache);
    for (const int64_t h_q : {1, 3, 16, 130}) attend(cache, h_q);
  }
  std::puts("done");
}
