// Dense attention over sequences that lie one after another. Each sequence is, for the kernels, a decode call of its
// own whose cache is a single page: V holds the values, K the keys. An item is a block of query rows of one KV head;
// items are independent, so nothing is merged, and threads take them one at a time, the longest first.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>
#include <tuple>
#include <vector>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/schedule.h"

namespace flashmla {
namespace {

thread_local Arena arena;
// Lists that the calling thread keeps, so that a call in steady state allocates nothing.
thread_local std::vector<FlashmlaDecode> kept_sequences;
thread_local std::vector<Item> kept_items;

class Prefill {
public:
  explicit Prefill(const FlashmlaPrefill& call) : call_(call), kernels_(kernels()) {
    stride_ = kernels_.accumulator_stride(call.d_v);
    sequences_.clear(), items_.clear();
    for (int64_t i = 0; i < call.b; i++) add_sequence(i);
    std::sort(items_.begin(), items_.end(), [this](const Item& a, const Item& b) {
      return std::tuple(-tokens(a), a.sequence, a.kv_head, a.row) <
             std::tuple(-tokens(b), b.sequence, b.kv_head, b.row);
    });
  }

  bool run(const FlashmlaRuntime& runtime) {
    const int64_t threads = std::min<int64_t>(runtime.num_threads, int64_t(items_.size()));
    if (threads <= 1) {
      work();
    } else {
      runtime.parallel(
          threads,
          [](int64_t begin, int64_t end, void* self) {
            for (int64_t i = begin; i < end; i++) static_cast<Prefill*>(self)->work();
          },
          this);
    }
    return !out_of_memory_;
  }

  FlashmlaFootprint footprint(int64_t num_threads) const {
    FlashmlaFootprint largest{};
    for (const Item& item : items_) {
      const ScratchBytes scratch = kernels_.scratch_bytes(sequences_[size_t(item.sequence)], item);
      largest.scores = std::max(largest.scores, scratch.scores);
      largest.copies = std::max(largest.copies, scratch.copies);
    }
    const int64_t threads = std::min(num_threads, int64_t(items_.size()));
    return {largest.scores * threads, largest.copies * threads, int64_t(accumulator_bytes()) * threads};
  }

private:
  size_t accumulator_bytes() const { return size_t(Schedule::kMaxRows * (stride_ + 2)) * sizeof(float); }

  void add_sequence(int64_t i) {
    const int64_t q_begin = bound(call_.cu_seqlens_q, call_.cu_seqlens_q_stride, i);
    const int64_t k_begin = bound(call_.cu_seqlens_k, call_.cu_seqlens_k_stride, i);
    const int64_t size = call_.dtype == FLASHMLA_F32 ? 4 : 2, group = call_.h_q / call_.h_kv;
    FlashmlaDecode one{};
    one.dtype = call_.dtype, one.causal = call_.causal, one.softmax_scale = call_.softmax_scale;
    one.levels = call_.levels;
    one.b = 1, one.s_q = bound(call_.cu_seqlens_q, call_.cu_seqlens_q_stride, i + 1) - q_begin;
    one.h_q = call_.h_q, one.h_kv = call_.h_kv, one.d_qk = call_.d_qk, one.d_v = one.qk_start = call_.d_v;
    one.q = static_cast<const char*>(call_.q) + q_begin * call_.q_stride[0] * size;
    std::copy(call_.q_stride, call_.q_stride + 3, one.q_stride + 1);
    one.kv = {static_cast<const char*>(call_.v) + k_begin * call_.v_stride[0] * size, 0, call_.v_stride[0],
              call_.v_stride[1], call_.d_v};
    one.k = {static_cast<const char*>(call_.k) + k_begin * call_.k_stride[0] * size, 0, call_.k_stride[0],
             call_.k_stride[1], call_.d_qk};
    const int64_t length = bound(call_.cu_seqlens_k, call_.cu_seqlens_k_stride, i + 1) - k_begin;
    one.n_pages = one.max_pages = 1, one.page_size = std::max<int64_t>(length, 1);
    one.block_table = &first_page_;
    one.out = static_cast<char*>(call_.out) + q_begin * call_.h_q * call_.d_v * size;
    one.out_stride[1] = call_.h_q * call_.d_v, one.out_stride[2] = call_.d_v;
    one.lse = call_.lse + q_begin;
    one.lse_stride[1] = call_.t_q, one.lse_stride[2] = 1;
    sequences_.push_back(one);
    for (int64_t head = 0; head < call_.h_kv; head++) {
      for (int64_t row = 0; row < one.s_q * group; row += Schedule::kMaxRows) {
        items_.push_back({i, head, row, std::min(Schedule::kMaxRows, one.s_q * group - row), length});
      }
    }
  }
  static int64_t bound(const int32_t* bounds, int64_t stride, int64_t i) { return bounds[i * stride]; }

  // Tokens that the item's last row sees.
  int64_t tokens(const Item& item) const {
    if (!call_.causal) return item.length;
    const int64_t last = (item.row + item.rows - 1) / (call_.h_q / call_.h_kv);
    return std::clamp<int64_t>(item.length - sequences_[size_t(item.sequence)].s_q + last + 1, 0, item.length);
  }

  void work() {
    const size_t accumulator = accumulator_bytes();
    for (size_t i = next_++; i < items_.size(); i = next_++) {
      Item item = items_[i];
      const FlashmlaDecode& one = sequences_[size_t(item.sequence)];
      item.sequence = 0;  // of `one`
      char* memory = arena.reserve(accumulator + size_t(kernels_.scratch_bytes(one, item).all()));
      if (memory == nullptr) {
        out_of_memory_ = true;
        return;
      }
      float* floats = reinterpret_cast<float*>(memory);
      const Accumulator into{floats + 2 * Schedule::kMaxRows, floats, floats + Schedule::kMaxRows, stride_};
      kernels_.attend(one, item, 0, tokens(items_[i]), into, memory + accumulator);
      kernels_.finish(one, item, &into, 1, 0, item.rows);
    }
  }

  const FlashmlaPrefill& call_;
  const Kernels& kernels_;
  const int32_t first_page_ = 0;
  int64_t stride_;
  std::vector<FlashmlaDecode>& sequences_ = kept_sequences;
  std::vector<Item>& items_ = kept_items;
  std::atomic<size_t> next_{0};
  std::atomic<bool> out_of_memory_{false};
};

int check_bounds(const char* name, const int32_t* bounds, int64_t stride, int64_t b, int64_t tokens, char* message) {
  const char* form = "flashmla::prefill: argument '%s': expected %s%lld at [%lld]%s, got %d";
  if (bounds[0] != 0) {
    std::snprintf(message, FLASHMLA_MESSAGE, form, name, "", 0LL, 0LL, "", bounds[0]);
    return 1;
  }
  for (int64_t i = 1; i <= b; i++) {
    if (bounds[i * stride] < bounds[(i - 1) * stride]) {
      std::snprintf(message, FLASHMLA_MESSAGE, form, name, "at least ", (long long)bounds[(i - 1) * stride],
                    (long long)i, "", bounds[i * stride]);
      return 1;
    }
  }
  if (bounds[b * stride] != tokens) {
    std::snprintf(message, FLASHMLA_MESSAGE, form, name, "", (long long)tokens, (long long)b, ", the number of tokens",
                  bounds[b * stride]);
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_prefill(const FlashmlaPrefill* call, const FlashmlaRuntime* runtime, char* message) try {
  using namespace flashmla;
  if (check_bounds("cu_seqlens_q", call->cu_seqlens_q, call->cu_seqlens_q_stride, call->b, call->t_q, message) ||
      check_bounds("cu_seqlens_k", call->cu_seqlens_k, call->cu_seqlens_k_stride, call->b, call->t_k, message)) {
    return 1;
  }
  if (call->h_q == 0 || Prefill(*call).run(*runtime)) return 0;
  std::snprintf(message, FLASHMLA_MESSAGE, "flashmla::prefill: out of memory");
  return 1;
} catch (const std::bad_alloc&) {
  std::snprintf(message, FLASHMLA_MESSAGE, "flashmla::prefill: out of memory");
  return 1;
}

extern "C" void flashmla_prefill_footprint(const FlashmlaPrefill* call, int64_t num_threads,
                                           FlashmlaFootprint* footprint) {
  *footprint = flashmla::Prefill(*call).footprint(num_threads);
}
