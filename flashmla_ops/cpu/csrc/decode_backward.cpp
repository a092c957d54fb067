// Gradients through attention over a paged cache.
//
// First each KV head of each sequence adds up, alone and in memory of its own, the gradients of the rows that it reads.
// Then each page is written: the sum over the sequences that hold it, in their order, and zeros where none reads a row.
// So results do not depend on the number of threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "flashmla/decode.h"
#include "flashmla/dispatch.h"
#include "flashmla/prefill.h"
#include "flashmla/turns.h"

namespace flashmla {
namespace {

thread_local Arena work_arena, rows_arena;

class DecodeBackward {
public:
  explicit DecodeBackward(const FlashmlaDecodeBackward& call)
      : call_(call), attention_(call.attention), kernels_(kernels()), row_floats_(attention_.kv.d + attention_.k.d) {
    int64_t floats = 0;
    for (int64_t i = 0; i < attention_.b; i++) {
      first_.push_back(floats);
      floats += attention_.h_kv * length(i) * row_floats_;
    }
    first_.push_back(floats);
  }

  // False if there is no memory.
  bool run(const FlashmlaRuntime& runtime) {
    if (wants_rows()) {
      char* memory = rows_arena.reserve(size_t(first_.back() + 1) * sizeof(float));
      if (memory == nullptr) return false;
      rows_ = reinterpret_cast<float*>(memory);
      list_holders();
    }
    const int64_t h_kv = attention_.h_kv;
    if (!in_turns(runtime, attention_.b * h_kv, [&](int64_t i) { return compute(i / h_kv, i % h_kv); })) return false;
    if (!wants_rows()) return true;
    return in_turns(runtime, attention_.n_pages * h_kv, [&](int64_t i) {
      write(i / h_kv, i % h_kv);
      return true;
    });
  }

private:
  // A sequence that holds a page, and its first token there.
  struct Holder {
    int64_t sequence, token;
  };

  bool wants_rows() const { return call_.dkv_cache || call_.dk_cache; }
  FlashmlaGradients gradients_of(int64_t i) const {
    if (attention_.cu_seqlens_q == nullptr) return call_.gradients;
    const Bounds bounds{attention_.cu_seqlens_q, attention_.cu_seqlens_q_stride};
    return gradients_from(call_.gradients, attention_.dtype, bounds[i]);
  }
  int64_t length(int64_t i) const { return attention_.cache_seqlens[i * attention_.cache_seqlens_stride]; }
  float* rows(int64_t i, int64_t head) const { return rows_ + first_[size_t(i)] + head * length(i) * row_floats_; }

  bool compute(int64_t i, int64_t head) const {
    const FlashmlaDecode one = sequence_of(attention_, i);
    const FlashmlaGradients gradients = gradients_of(i);
    const int64_t rows_of_head = one.s_q * group_size(one), n = length(i);
    const Item largest{i, head, 0, std::min(rows_of_head, Schedule::kMaxRows), n};
    char* scratch = work_arena.reserve(size_t(kernels_.backward_scratch_bytes(one, largest)));
    if (scratch == nullptr) return false;
    float* into = wants_rows() ? rows(i, head) : nullptr;
    if (into) std::memset(into, 0, size_t(n * row_floats_) * sizeof(float));
    for (int64_t row = 0; row < rows_of_head; row += Schedule::kMaxRows) {
      const Item item{i, head, row, std::min(Schedule::kMaxRows, rows_of_head - row), n};
      const Tokens tokens = tokens_of(one, item);
      kernels_.backward(one, gradients, item, tokens.begin, tokens.end, into, row_floats_, scratch, false);
    }
    return true;
  }

  // Of each page, the sequences that hold it and attend to a row of it.
  void list_holders() {
    holders_.resize(size_t(attention_.n_pages));
    for (int64_t i = 0; i < attention_.b; i++) {
      const Tokens tokens = attended(attention_, i);
      for (int64_t index = tokens.begin / attention_.page_size; index * attention_.page_size < tokens.end; index++) {
        const int64_t* stride = attention_.block_table_stride;
        const int64_t page = attention_.block_table[i * stride[0] + index * stride[1]];
        holders_[size_t(page)].push_back({i, index * attention_.page_size});
      }
    }
  }

  void write(int64_t page, int64_t head) const {
    const std::vector<Holder>& holders = holders_[size_t(page)];
    std::vector<const float*> parts;
    // Tokens that the same sequences read are written at once.
    for (int64_t token = 0, end; token < attention_.page_size; token = end) {
      end = attention_.page_size;
      parts.clear();
      for (const Holder& holder : holders) {
        const int64_t left = length(holder.sequence) - holder.token;
        if (left <= token) continue;
        end = std::min(end, left);
        parts.push_back(rows(holder.sequence, head) + (holder.token + token) * row_floats_);
      }
      write_rows(page, head, token, end, parts, call_.dkv_cache, attention_.kv.d);
      for (const float*& part : parts) part += attention_.kv.d;
      write_rows(page, head, token, end, parts, call_.dk_cache, attention_.k.d);
    }
  }
  void write_rows(int64_t page, int64_t head, int64_t token, int64_t end, const std::vector<const float*>& parts,
                  void* to, int64_t d) const {
    if (to == nullptr) return;
    const int64_t size = attention_.dtype == FLASHMLA_F32 ? 4 : 2, h_kv = attention_.h_kv;
    char* first = static_cast<char*>(to) + ((page * attention_.page_size + token) * h_kv + head) * d * size;
    kernels_.sum_rows(attention_.dtype, parts.data(), int64_t(parts.size()), end - token, row_floats_, d, first,
                      h_kv * d);
  }

  const FlashmlaDecodeBackward& call_;
  const FlashmlaDecode& attention_;
  const Kernels& kernels_;
  const int64_t row_floats_;
  std::vector<int64_t> first_;  // of each sequence's gradients in rows_: [h_kv, length, row_floats_]
  std::vector<std::vector<Holder>> holders_;
  float* rows_ = nullptr;
};

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_decode_backward(const FlashmlaDecodeBackward* call, const FlashmlaRuntime* runtime,
                                        char* message) try {
  using namespace flashmla;
  const FlashmlaDecode& attention = call->attention;
  if (check_lengths(attention, message)) return 1;
  if (attention.cu_seqlens_q) {
    const Bounds bounds{attention.cu_seqlens_q, attention.cu_seqlens_q_stride};
    if (bounds.check(attention.op, "cu_seqlens_q", attention.b, attention.t_q, message)) return 1;
  }
  if (check_pages(attention, message)) return 1;
  if (DecodeBackward(*call).run(*runtime)) return 0;
  return out_of_memory(message, attention.op);
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, call->attention.op);
}
