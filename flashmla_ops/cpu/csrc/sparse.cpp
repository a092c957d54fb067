// Attention of each query token over rows of its own, which indices name.
//
// A query token is, for the kernels, an item whose rows are slots: those of its indices that are slots at all, in their
// order. Its rows are cut into pieces, at least one for each source of rows; the merge of pieces is what makes one
// softmax of them. A thread takes whole query tokens, or pieces where there are fewer tokens than threads.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/schedule.h"
#include "flashmla/source_slots.h"

namespace flashmla {
namespace {

thread_local Arena work_arena, result_arena;

constexpr int64_t kMinRows = 64;         // a piece is not made shorter than this
constexpr int64_t kInvariantRows = 512;  // nor than this where cuts depend on the token's own rows alone,
constexpr int64_t kInvariantCuts = 8;    // of which there are so many pieces at most
constexpr int64_t kMergeRows = 16;       // query rows that are merged at a time
constexpr int64_t kSerial = 1 << 18;     // multiply-adds that cost less than waking a thread

class Sparse {
public:
  Sparse(const FlashmlaSparse& call, int64_t num_threads) : call_(call), kernels_(kernels()) {
    const FlashmlaDecode& attention = call.attention;
    stride_ = kernels_.accumulator_stride(attention.d_v);
    group_ = attention.h_q / attention.h_kv;
    blocks_ = Schedule::divide_up(group_, Schedule::kMaxRows);
    items_ = attention.b * attention.s_q * attention.h_kv * blocks_;
    int64_t topk = 0;
    for (int32_t i = 0; i < call.n_sources; i++) {
      const FlashmlaSource& source = call.sources[i];
      FlashmlaDecode& one = calls_[i];
      one = attention;
      one.causal = 0, one.levels = 3;
      one.kv = source.kv, one.k = source.k, one.row_format = source.row_format;
      one.n_pages = source.n_pages, one.page_size = source.page_size;
      topk = std::max(topk, source.topk);
      const Item largest{0, 0, 0, std::min(group_, Schedule::kMaxRows), source.topk};
      scratch_ = std::max(scratch_, kernels_.scratch_bytes(one, largest).all());
    }
    const double products = double(attention.b * attention.s_q * attention.h_q) * double(topk) *
                            double(attention.d_qk + attention.d_v) * call.n_sources;
    threads_ = products < kSerial ? 1 : num_threads;
    split_ = items_ < threads_;
    if (call.batch_invariant) {
      cuts_ = std::clamp<int64_t>(Schedule::divide_up(topk, kInvariantRows), 1, kInvariantCuts);
    } else if (split_) {
      const int64_t most = std::min<int64_t>(Schedule::divide_up(threads_, items_), FLASHMLA_MAX_PARTS / 2);
      cuts_ = std::clamp<int64_t>(Schedule::divide_up(topk, kMinRows), 1, most);
    }
    split_ = split_ && pieces() > 1;
    slots_bytes_ = (topk * int64_t{sizeof(int32_t)} + 63) / 64 * 64;
  }

  // False if a thread could not get its memory.
  bool run(const FlashmlaRuntime& runtime) {
    if (split_) {
      char* memory = result_arena.reserve(size_t(items_ * pieces() * accumulator_bytes()));
      if (memory == nullptr) return false;
      results_ = reinterpret_cast<float*>(memory);
    }
    in_parallel(runtime, split_ ? items_ * pieces() : items_, &Sparse::attend_units);
    if (split_ && !out_of_memory_) in_parallel(runtime, items_ * merges(), &Sparse::merge_units);
    return !out_of_memory_;
  }

private:
  int64_t pieces() const { return call_.n_sources * cuts_; }
  int64_t merges() const { return Schedule::divide_up(std::min(group_, Schedule::kMaxRows), kMergeRows); }
  int64_t accumulator_floats() const { return Schedule::kMaxRows * (stride_ + 2); }
  int64_t accumulator_bytes() const { return accumulator_floats() * int64_t{sizeof(float)}; }
  Accumulator accumulator(float* memory) const {
    return {memory + 2 * Schedule::kMaxRows, memory, memory + Schedule::kMaxRows, stride_};
  }
  Accumulator result(int64_t item, int64_t piece) const {
    return accumulator(results_ + (item * pieces() + piece) * accumulator_floats());
  }

  Item item_at(int64_t index) const {
    const FlashmlaDecode& attention = call_.attention;
    const int64_t block = index % blocks_, head = index / blocks_ % attention.h_kv;
    const int64_t token = index / blocks_ / attention.h_kv, first = block * Schedule::kMaxRows;
    return {token / attention.s_q, head, token % attention.s_q * group_ + first,
            std::min(Schedule::kMaxRows, group_ - first), 0};
  }

  // Threads take the units [0, n) one at a time.
  void in_parallel(const FlashmlaRuntime& runtime, int64_t n, void (Sparse::*work)()) {
    next_ = 0, units_ = n, work_ = work;
    const int64_t threads = std::min(threads_, n);
    if (threads <= 1) {
      if (n) (this->*work)();
      return;
    }
    runtime.parallel(
        threads,
        [](int64_t begin, int64_t end, void* self) {
          Sparse& sparse = *static_cast<Sparse*>(self);
          for (int64_t i = begin; i < end; i++) (sparse.*sparse.work_)();
        },
        this);
  }

  void attend_units() {
    const int64_t kept = split_ ? 0 : pieces();
    char* memory = work_arena.reserve(size_t(kept * accumulator_bytes() + slots_bytes_ + scratch_));
    if (memory == nullptr) {
      out_of_memory_ = true;
      return;
    }
    float* accumulators = reinterpret_cast<float*>(memory);
    int32_t* slots = reinterpret_cast<int32_t*>(memory + kept * accumulator_bytes());
    char* scratch = memory + kept * accumulator_bytes() + slots_bytes_;
    for (int64_t unit = next_++; unit < units_; unit = next_++) {
      if (split_) {
        const int64_t index = unit / pieces(), piece = unit % pieces(), source = piece / cuts_, cut = piece % cuts_;
        Item item = item_at(index);
        find_slots(source, item, slots);
        attend(source, item, cut, result(index, piece), scratch);
        continue;
      }
      Item item = item_at(unit);
      Accumulator parts[2 * kInvariantCuts];
      int64_t n = 0;
      for (int64_t source = 0; source < call_.n_sources; source++) {
        find_slots(source, item, slots);
        for (int64_t cut = 0; cut < cuts_ && cut * step(item.length) < item.length; cut++, n++) {
          parts[n] = accumulator(accumulators + n * accumulator_floats());
          attend(source, item, cut, parts[n], scratch);
        }
      }
      kernels_.finish(calls_[0], item, parts, n, 0, item.rows);
    }
  }

  // The item's rows in a source.
  void find_slots(int64_t index, Item& item, int32_t* slots) const {
    item.length = flashmla::find_slots(call_.sources[index], item.sequence, item.row / group_, item.kv_head, slots);
    item.slots = slots;
  }

  // Rows of a piece of `length`.
  int64_t step(int64_t length) const {
    const int64_t cuts = call_.batch_invariant ? kInvariantCuts : cuts_;
    const int64_t rows = Schedule::divide_up(length, cuts * Schedule::kUnit) * Schedule::kUnit;
    return std::max(rows, call_.batch_invariant ? kInvariantRows : Schedule::kUnit);
  }

  void attend(int64_t source, const Item& item, int64_t cut, const Accumulator& into, char* scratch) const {
    const int64_t begin = std::min(cut * step(item.length), item.length);
    const int64_t end = std::min(begin + step(item.length), item.length);
    kernels_.attend(calls_[source], item, begin, end, into, scratch);
  }

  void merge_units() {
    for (int64_t unit = next_++; unit < units_; unit = next_++) {
      const int64_t index = unit / merges(), begin = unit % merges() * kMergeRows;
      const Item item = item_at(index);
      if (begin >= item.rows) continue;
      Accumulator parts[FLASHMLA_MAX_PARTS];
      for (int64_t piece = 0; piece < pieces(); piece++) parts[piece] = result(index, piece);
      kernels_.finish(calls_[0], item, parts, pieces(), begin, std::min(begin + kMergeRows, item.rows));
    }
  }

  const FlashmlaSparse& call_;
  const Kernels& kernels_;
  FlashmlaDecode calls_[2];  // one for each source
  int64_t stride_, group_, blocks_, items_, threads_, cuts_ = 1, scratch_ = 0, slots_bytes_;
  bool split_;
  float* results_ = nullptr;
  void (Sparse::*work_)() = nullptr;
  int64_t units_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_sparse(const FlashmlaSparse* call, const FlashmlaRuntime* runtime, char* message) {
  using namespace flashmla;
  for (int32_t i = 0; i < call->n_sources; i++) {
    if (check_topk_length(*call, i, message)) return 1;
  }
  const FlashmlaDecode& attention = call->attention;
  if (attention.b == 0 || attention.s_q == 0 || attention.h_q == 0) return 0;
  if (Sparse(*call, runtime->num_threads).run(*runtime)) return 0;
  std::snprintf(message, FLASHMLA_MESSAGE, "flashmla::%s: out of memory", call->attention.op);
  return 1;
}
