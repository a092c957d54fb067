// Attention of each query token over rows of its own, which indices name.
//
// A query token is, for the kernels, an item whose rows are slots: those of its indices that are slots at all, in their
// order. Its rows are cut into pieces, at least one for each source of rows; the merge of pieces is what makes one
// softmax of them. A thread takes whole query tokens, or pieces where there are fewer tokens than threads.
#include <algorithm>
#include <cstring>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/failure.h"
#include "flashmla/schedule.h"
#include "flashmla/source_slots.h"
#include "flashmla/turns.h"

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
    const FlashmlaRuntime threads{threads_, runtime.parallel};
    if (!split_) return in_turns(threads, items_, [this](int64_t i) { return attend_item(i); });
    return in_turns(threads, items_ * pieces(),
                    [this](int64_t i) { return attend_piece(i / pieces(), i % pieces()); }) &&
           in_turns(threads, items_ * merges(), [this](int64_t i) { return merge(i / merges(), i % merges()); });
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

  // Memory of a thread for slots, scratch and so many accumulators; slots are null if there is none.
  struct Memory {
    int32_t* slots;
    char* scratch;
    float* accumulators;
  };
  Memory memory(int64_t accumulators) const {
    char* memory = work_arena.reserve(size_t(accumulators * accumulator_bytes() + slots_bytes_ + scratch_));
    if (memory == nullptr) return {};
    char* slots = memory + accumulators * accumulator_bytes();
    return {reinterpret_cast<int32_t*>(slots), slots + slots_bytes_, reinterpret_cast<float*>(memory)};
  }

  // These return false if there is no memory.
  bool attend_piece(int64_t index, int64_t piece) const {
    const Memory own = memory(0);
    if (own.slots == nullptr) return false;
    Item item = item_at(index);
    find_slots(piece / cuts_, item, own.slots);
    attend(piece / cuts_, item, piece % cuts_, result(index, piece), own.scratch);
    return true;
  }
  bool attend_item(int64_t index) const {
    const Memory own = memory(pieces());
    if (own.slots == nullptr) return false;
    Item item = item_at(index);
    Accumulator parts[2 * kInvariantCuts];
    int64_t n = 0;
    for (int64_t source = 0; source < call_.n_sources; source++) {
      find_slots(source, item, own.slots);
      for (int64_t cut = 0; cut < cuts_ && cut * step(item.length) < item.length; cut++, n++) {
        parts[n] = accumulator(own.accumulators + n * accumulator_floats());
        attend(source, item, cut, parts[n], own.scratch);
      }
    }
    kernels_.finish(calls_[0], item, parts, n, 0, item.rows);
    return true;
  }
  bool merge(int64_t index, int64_t block) const {
    const Item item = item_at(index);
    const int64_t begin = block * kMergeRows;
    if (begin >= item.rows) return true;
    Accumulator parts[FLASHMLA_MAX_PARTS];
    for (int64_t piece = 0; piece < pieces(); piece++) parts[piece] = result(index, piece);
    kernels_.finish(calls_[0], item, parts, pieces(), begin, std::min(begin + kMergeRows, item.rows));
    return true;
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

  const FlashmlaSparse& call_;
  const Kernels& kernels_;
  FlashmlaDecode calls_[2];  // one for each source
  int64_t stride_, group_, blocks_, items_, threads_, cuts_ = 1, scratch_ = 0, slots_bytes_;
  bool split_;
  float* results_ = nullptr;
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
  return out_of_memory(message, call->attention.op);
}
