// One decode call: check what only the data can tell, run the schedule's parts in parallel, merge what was cut.
// Included by the library and by generated kernels, each with kernels of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "flashmla/arena.h"
#include "flashmla/bounds.h"
#include "flashmla/failure.h"
#include "flashmla/kernels.h"
#include "flashmla/schedule.h"

namespace flashmla {
namespace {

thread_local Arena schedule_arena, scratch_arena, result_arena;

// The sizes that every item fits in.
Item largest_item(const FlashmlaDecode& call, const Schedule& shape) {
  Item item{};
  item.rows = std::min(shape.row_block, shape.rows());
  for (int64_t i = 0; i < call.b; i++) {
    item.length = std::max<int64_t>(item.length, call.cache_seqlens[i * call.cache_seqlens_stride]);
  }
  return item;
}

class Decode {
public:
  Decode(const Kernels& kernels, const FlashmlaDecode& call, const Schedule& shape, const int32_t* schedule)
      : call_(call), kernels_(kernels), shape_(shape), starts_(schedule == nullptr ? nullptr : shape.starts(schedule)) {
    stride_ = kernels_.accumulator_stride(call.d_v);
    accumulator_floats_ = Schedule::kMaxRows * (stride_ + 2);
  }

  // False if a thread could not get its memory, or met a page that the cache does not have (then `bad_page`).
  bool run(const FlashmlaRuntime& runtime) {
    if (call_.levels == 3) {
      const size_t slots = size_t(2 * shape_.num_parts);
      char* memory = result_arena.reserve(slots * (size_t(accumulator_bytes()) + sizeof(Accumulator) + 8));
      if (memory == nullptr) return false;
      results_ = reinterpret_cast<float*>(memory);
      pieces_ = reinterpret_cast<Accumulator*>(memory + slots * size_t(accumulator_bytes()));
      piece_items_ = reinterpret_cast<int64_t*>(pieces_ + slots);
    }
    plan();
    if (busy_parts_ <= 1 || runtime.num_threads <= 1) {
      attend_parts(0, shape_.num_parts);
    } else {
      runtime.parallel(
          shape_.num_parts, [](int64_t a, int64_t b, void* self) { static_cast<Decode*>(self)->attend_parts(a, b); },
          this);
    }
    if (bad_page || out_of_memory_) return false;
    merge(runtime);
    return true;
  }

  FlashmlaFootprint footprint(int64_t num_threads) const {
    const ScratchBytes scratch = kernels_.scratch_bytes(call_, largest_item(call_, shape_));
    const int64_t slots = call_.levels == 3 ? 2 * shape_.num_parts : 0;
    return {scratch.scores * num_threads, scratch.copies * num_threads, (num_threads + slots) * accumulator_bytes()};
  }

  std::atomic<bool> bad_page{false};

private:
  int64_t accumulator_bytes() const { return accumulator_floats_ * int64_t{sizeof(float)}; }

  Item item_at(int64_t index) const {
    const int64_t per_sequence = shape_.items_per_sequence(), per_head = shape_.items_per_head();
    Item item;
    item.sequence = index / per_sequence;
    item.kv_head = index % per_sequence / per_head;
    item.row = index % per_head * shape_.row_block;
    item.rows = std::min(shape_.row_block, shape_.rows() - item.row);
    item.length = call_.cache_seqlens[item.sequence * call_.cache_seqlens_stride];
    return item;
  }

  // Where a piece of a cut item is kept: part p keeps its first in slot 2p and its last in slot 2p + 1.
  Accumulator slot(int64_t index) const { return accumulator(results_ + index * accumulator_floats_); }
  Accumulator accumulator(float* memory) const {
    return {memory + 2 * Schedule::kMaxRows, memory, memory + Schedule::kMaxRows, stride_};
  }

  // Calls visit(item index, first token, last token, whole item?, slot) for each piece of a part.
  template <class Visit>
  void for_pieces(int64_t part, Visit visit) const {
    const int64_t first = starts_[2 * part], begin = starts_[2 * part + 1];
    const int64_t last = starts_[2 * part + 2], end = starts_[2 * part + 3];
    for (int64_t index = first; index < last || (index == last && end > 0); index++) {
      const int64_t length = item_at(index).length;
      const int64_t from = index == first ? begin : 0, to = index == last ? end : length;
      visit(index, from, to, from == 0 && to == length, 2 * part + (index == first ? 0 : 1));
    }
  }

  void plan() {
    for (int64_t part = 0; part < shape_.num_parts; part++) {
      bool busy = false;
      for_pieces(part, [&](int64_t index, int64_t, int64_t, bool whole, int64_t slot) {
        busy = true;
        if (whole) return;
        piece_items_[n_pieces_] = index;
        pieces_[n_pieces_++] = this->slot(slot);
      });
      busy_parts_ += busy;
    }
  }

  void attend_parts(int64_t begin, int64_t end) {
    const int64_t scratch = kernels_.scratch_bytes(call_, largest_item(call_, shape_)).all();
    char* memory = scratch_arena.reserve(size_t(scratch + accumulator_bytes()));
    if (memory == nullptr) {
      out_of_memory_ = true;
      return;
    }
    const Accumulator own = accumulator(reinterpret_cast<float*>(memory));
    for (int64_t part = begin; part < end; part++) {
      for_pieces(part, [&](int64_t index, int64_t from, int64_t to, bool whole, int64_t slot_index) {
        if (bad_page) return;
        const Item item = item_at(index);
        const Accumulator into = whole ? own : slot(slot_index);
        if (!kernels_.attend(call_, item, from, to, into, memory + accumulator_bytes())) {
          bad_page = true;
        } else if (whole) {
          kernels_.finish(call_, item, &own, 1, 0, item.rows);
        }
      });
    }
  }

  void merge(const FlashmlaRuntime& runtime) {
    if (n_pieces_ == 0) return;
    if (runtime.num_threads <= 1) {
      merge_rows(0, Schedule::kMaxRows);
    } else {
      runtime.parallel(
          Schedule::kMaxRows, [](int64_t a, int64_t b, void* self) { static_cast<Decode*>(self)->merge_rows(a, b); },
          this);
    }
  }

  // Rows [begin, end) of every item that was cut. Pieces of one item follow one another.
  void merge_rows(int64_t begin, int64_t end) {
    for (int64_t first = 0, last; first < n_pieces_; first = last) {
      for (last = first + 1; last < n_pieces_ && piece_items_[last] == piece_items_[first];) last++;
      const Item item = item_at(piece_items_[first]);
      const int64_t stop = std::min(end, item.rows);
      if (begin < stop) kernels_.finish(call_, item, pieces_ + first, last - first, begin, stop);
    }
  }

  const FlashmlaDecode& call_;
  const Kernels& kernels_;
  const Schedule& shape_;
  const int32_t* starts_;
  int64_t stride_, accumulator_floats_, busy_parts_ = 0, n_pieces_ = 0;
  float* results_ = nullptr;
  Accumulator* pieces_ = nullptr;   // the pieces of cut items, in order,
  int64_t* piece_items_ = nullptr;  // and the item of each
  std::atomic<bool> out_of_memory_{false};
};

inline int check_lengths(const FlashmlaDecode& call, char* message) {
  const int64_t capacity = call.max_pages * call.page_size;
  for (int64_t i = 0; i < call.b; i++) {
    const int64_t length = call.cache_seqlens[i * call.cache_seqlens_stride];
    if (length < 0 || length > capacity) return fail_length(message, call.op, capacity, length, i);
  }
  return 0;
}

// The call for the queries of sequence i, which items still name by its number.
inline FlashmlaDecode sequence_of(FlashmlaDecode call, int64_t i) {
  if (call.cu_seqlens_q == nullptr) return call;
  const Bounds bounds{call.cu_seqlens_q, call.cu_seqlens_q_stride};
  const int64_t size = call.dtype == FLASHMLA_F32 ? 4 : 2;
  call.cu_seqlens_q = nullptr, call.s_q = bounds[i + 1] - bounds[i];
  call.q = static_cast<const char*>(call.q) + bounds[i] * call.q_stride[1] * size;
  call.q_stride[0] = call.out_stride[0] = call.lse_stride[0] = 0;
  if (call.out) call.out = static_cast<char*>(call.out) + bounds[i] * call.out_stride[1] * size;
  if (call.lse) call.lse += bounds[i] * call.lse_stride[2];
  return call;
}

// The tokens of a sequence that any of its queries sees.
inline Tokens attended(const FlashmlaDecode& all, int64_t sequence) {
  const int64_t length = all.cache_seqlens[sequence * all.cache_seqlens_stride];
  const FlashmlaDecode call = sequence_of(all, sequence);
  if (call.s_q == 0) return {0, 0};
  const Item item{sequence, 0, 0, 0, length};
  const int64_t end = std::clamp<int64_t>(visible(call, item, call.s_q * group_size(call) - 1).end, 0, length);
  return {std::min(visible(call, item, 0).begin, end), end};
}

// 1 with the first bad page of a row that counts, in the order of the table; 0 if there is none.
inline int check_pages(const FlashmlaDecode& call, char* message) {
  for (int64_t i = 0; i < call.b; i++) {
    const Tokens tokens = attended(call, i);
    for (int64_t j = tokens.begin / call.page_size; j * call.page_size < tokens.end; j++) {
      const int64_t page = call.block_table[i * call.block_table_stride[0] + j * call.block_table_stride[1]];
      if (page < 0 || page >= call.n_pages) return fail_page(message, call.op, call.n_pages, page, i, j);
    }
  }
  return 0;
}
// The same, whichever thread met a bad page first.
inline int name_bad_page(const FlashmlaDecode& call, char* message) {
  if (check_pages(call, message)) return 1;
  return fail(message, call.op, "block_table", "a tensor that nobody writes to during the call", "another one");
}

// Schedules that this thread wrote last, in its arena. A decode loop brings the same one for each layer: it is made
// once.
struct WrittenSchedule {
  const int32_t* data = nullptr;
  int64_t numel = 0;

  bool operator==(const int32_t* schedule) const { return numel && std::equal(data, data + numel, schedule); }
};
inline thread_local WrittenSchedule written_schedule;

inline const int32_t* write_schedule(const Schedule& shape, const int32_t* cache_seqlens, int64_t stride,
                                     bool whole = false) {
  written_schedule = {};
  int32_t* schedule = reinterpret_cast<int32_t*>(schedule_arena.reserve(size_t(shape.numel()) * sizeof(int32_t)));
  if (schedule == nullptr) throw std::bad_alloc();
  shape.write(cache_seqlens, stride, schedule, whole);
  if (!whole) written_schedule = {schedule, shape.numel()};
  return schedule;
}

// The schedule is a tensor that anyone may have written: nothing in it is trusted.
inline int check_schedule(const FlashmlaDecode& call, const int32_t* schedule, int64_t numel, char* message) {
  char expected[128], actual[128];
  const int64_t wanted[4] = {call.b, call.s_q, call.h_q, call.h_kv};
  if (!std::equal(wanted, wanted + 4, schedule)) {
    return fail(message, call.op, "schedule",
                text(expected, "a schedule made for [b, s_q, h_q, h_kv] [%lld, %lld, %lld, %lld]", (long long)call.b,
                     (long long)call.s_q, (long long)call.h_q, (long long)call.h_kv),
                text(actual, "one made for [%d, %d, %d, %d]", schedule[0], schedule[1], schedule[2], schedule[3]));
  }
  const int64_t parts = schedule[4];
  const Schedule shape(call.b, call.s_q, call.h_q, call.h_kv, std::max<int64_t>(parts, 1));
  if (parts < 1 || parts > FLASHMLA_MAX_PARTS || numel != shape.numel() || schedule[5] != shape.row_block) {
    return fail(message, call.op, "schedule", "the tensor that decode_schedule returned",
                text(actual, "%lld elements", (long long)numel));
  }
  for (int64_t i = 0; i < call.b; i++) {
    const int32_t length = call.cache_seqlens[i * call.cache_seqlens_stride], made_for = shape.lengths(schedule)[i];
    if (length != made_for) {
      return fail(message, call.op, "schedule",
                  text(expected, "a schedule made for length %d at [%lld]", length, (long long)i),
                  text(actual, "one made for length %d", made_for));
    }
  }
  if (written_schedule.numel == numel && written_schedule == schedule) return 0;
  const int32_t* fresh = write_schedule(shape, call.cache_seqlens, call.cache_seqlens_stride);
  if (!std::equal(fresh + Schedule::kHeader, fresh + numel, schedule + Schedule::kHeader)) {
    return fail(message, call.op, "schedule", "the tensor that decode_schedule returned", "other cuts");
  }
  return 0;
}

// A decode call with these kernels: 0, or 1 with the reason in message[FLASHMLA_MESSAGE]. Without a schedule one is
// made for the threads of the runtime.
inline int decode(const Kernels& kernels, const FlashmlaDecode& call, const int32_t* schedule, int64_t schedule_numel,
                  const FlashmlaRuntime& runtime, char* message) try {
  if (check_lengths(call, message)) return 1;
  if (call.b == 0 || call.h_q == 0) return 0;
  if (schedule != nullptr) {
    if (check_schedule(call, schedule, schedule_numel, message)) return 1;
  } else {
    const int64_t parts = std::min<int64_t>(runtime.num_threads, FLASHMLA_MAX_PARTS);
    schedule = write_schedule(Schedule(call.b, call.s_q, call.h_q, call.h_kv, parts), call.cache_seqlens,
                              call.cache_seqlens_stride, call.levels < 3);
  }
  const Schedule shape(call.b, call.s_q, call.h_q, call.h_kv, schedule[4]);
  Decode run(kernels, call, shape, schedule);
  if (run.run(runtime)) return 0;
  if (run.bad_page) return name_bad_page(call, message);
  return out_of_memory(message, call.op);
} catch (const std::bad_alloc&) {
  return out_of_memory(message, call.op);
}

}  // namespace
}  // namespace flashmla
