// Dense attention over sequences that lie one after another. An item is a block of query rows of one KV head; items are
// independent, so nothing is merged, and threads take them one at a time, the longest first.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>
#include <tuple>
#include <vector>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/prefill.h"
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
    const FlashmlaDecode& one = sequences_.emplace_back(sequence_of(call_, i));
    const int64_t rows = one.s_q * (call_.h_q / call_.h_kv), length = length_of(call_, i);
    for (int64_t head = 0; head < call_.h_kv; head++) {
      for (int64_t row = 0; row < rows; row += Schedule::kMaxRows) {
        items_.push_back({i, head, row, std::min(Schedule::kMaxRows, rows - row), length});
      }
    }
  }

  int64_t tokens(const Item& item) const { return tokens_of(sequences_[size_t(item.sequence)], item); }

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
  int64_t stride_;
  std::vector<FlashmlaDecode>& sequences_ = kept_sequences;
  std::vector<Item>& items_ = kept_items;
  std::atomic<size_t> next_{0};
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_prefill(const FlashmlaPrefill* call, const FlashmlaRuntime* runtime, char* message) try {
  using namespace flashmla;
  if (check_bounds("prefill", *call, message)) return 1;
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
