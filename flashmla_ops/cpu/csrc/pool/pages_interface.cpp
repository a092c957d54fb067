// The C interface of the books, for ctypes: a handle and plain arrays. A status is returned where a call may fail.
#include <algorithm>

#include "flashmla/interface.h"
#include "pool/pages.h"

using flashmla::pool::BatchTables;
using flashmla::pool::Counts;
using flashmla::pool::Found;
using flashmla::pool::Pages;

extern "C" {

FLASHMLA_EXPORT Pages* flashmla_pages_new(int64_t n_pages, int64_t page_size) { return new Pages(n_pages, page_size); }
FLASHMLA_EXPORT Pages* flashmla_pages_copy(const Pages* pages) { return new Pages(*pages); }
FLASHMLA_EXPORT void flashmla_pages_delete(Pages* pages) { delete pages; }

FLASHMLA_EXPORT int32_t flashmla_pages_allocate(Pages* pages, int64_t count, int32_t* out, Found* found) {
  return pages->allocate(count, out, *found);
}
// One page, or -1.
FLASHMLA_EXPORT int32_t flashmla_pages_allocate_one(Pages* pages) {
  Found found;
  int32_t page;
  return pages->allocate(1, &page, found) ? -1 : page;
}
FLASHMLA_EXPORT int32_t flashmla_pages_release_one(Pages* pages, int32_t page) {
  Found found;
  return pages->release(&page, 1, found);
}
FLASHMLA_EXPORT int32_t flashmla_pages_retain(Pages* pages, const int32_t* which, int64_t count, Found* found) {
  return pages->retain(which, count, *found);
}
FLASHMLA_EXPORT int32_t flashmla_pages_release(Pages* pages, const int32_t* which, int64_t count, Found* found) {
  return pages->release(which, count, *found);
}

FLASHMLA_EXPORT int64_t flashmla_pages_open_sequence(Pages* pages) { return pages->open_sequence(); }
FLASHMLA_EXPORT int32_t flashmla_pages_fork(Pages* pages, int64_t sequence, int64_t* child) {
  return pages->fork(sequence, *child);
}
FLASHMLA_EXPORT int64_t flashmla_pages_adopt(Pages* pages, const int32_t* which, const uint64_t* generations,
                                             int64_t* count, int64_t length) {
  return pages->adopt(which, generations, *count, length);
}
FLASHMLA_EXPORT int32_t flashmla_pages_truncate(Pages* pages, int64_t sequence, int64_t length) {
  return pages->truncate(sequence, length);
}
FLASHMLA_EXPORT int32_t flashmla_pages_close_sequence(Pages* pages, int64_t sequence) {
  return pages->close_sequence(sequence);
}
FLASHMLA_EXPORT int32_t flashmla_pages_reserve(Pages* pages, int64_t sequence, int64_t tokens, Found* found) {
  return pages->reserve(sequence, tokens, *found);
}
FLASHMLA_EXPORT int32_t flashmla_pages_step(Pages* pages, BatchTables* tables, int64_t b, int32_t behind,
                                            Found* found) {
  return pages->step(*tables, b, behind != 0, *found);
}
FLASHMLA_EXPORT int64_t flashmla_pages_commit(Pages* pages, BatchTables* tables, int64_t b) {
  return pages->commit(*tables, b);
}
FLASHMLA_EXPORT void flashmla_pages_roll_back(Pages* pages, const BatchTables* tables, int64_t b) {
  pages->roll_back(*tables, b);
}
FLASHMLA_EXPORT int32_t flashmla_pages_can_take(const Pages* pages, int64_t count) { return pages->can_take(count); }

FLASHMLA_EXPORT int64_t flashmla_pages_open_step(Pages* pages) { return pages->open_step(); }
FLASHMLA_EXPORT void flashmla_pages_close_step(Pages* pages, int64_t step) { pages->close_step(step); }

FLASHMLA_EXPORT uint64_t flashmla_pages_remember(Pages* pages, int32_t page) { return pages->remember(page); }
FLASHMLA_EXPORT int32_t flashmla_pages_remembers(const Pages* pages, int32_t page, uint64_t generation) {
  return pages->remembers(page, generation);
}
FLASHMLA_EXPORT void flashmla_pages_forget(Pages* pages, int32_t page) { pages->forget(page); }

// Moves as pairs, at most n_pages / 2 of them; their number, or -1 where steps are open.
FLASHMLA_EXPORT int64_t flashmla_pages_plan_moves(const Pages* pages, int32_t* moves) {
  std::vector<int32_t> planned;
  if (pages->plan_moves(planned)) return -1;
  std::copy(planned.begin(), planned.end(), moves);
  return static_cast<int64_t>(planned.size() / 2);
}
FLASHMLA_EXPORT void flashmla_pages_move(Pages* pages, const int32_t* moves, int64_t count) {
  pages->move(moves, count);
}

FLASHMLA_EXPORT int64_t flashmla_pages_length(const Pages* pages, int64_t sequence) {
  return pages->known(sequence) ? pages->length(sequence) : -1;
}
FLASHMLA_EXPORT int64_t flashmla_pages_written(const Pages* pages, int64_t sequence) {
  return pages->known(sequence) ? pages->written(sequence) : -1;
}
FLASHMLA_EXPORT int32_t flashmla_pages_copies_tail(const Pages* pages, int64_t sequence) {
  return pages->known(sequence) && pages->copies_tail(sequence);
}
// How many pages a sequence has, -1 if it is unknown; and the first `room` of them.
FLASHMLA_EXPORT int64_t flashmla_pages_of(const Pages* pages, int64_t sequence, int32_t* out, int64_t room) {
  if (!pages->known(sequence)) return -1;
  const auto& held = pages->pages_of(sequence);
  std::copy_n(held.begin(), std::min<int64_t>(room, static_cast<int64_t>(held.size())), out);
  return static_cast<int64_t>(held.size());
}
FLASHMLA_EXPORT int64_t flashmla_pages_references(const Pages* pages, int32_t page) { return pages->references(page); }
FLASHMLA_EXPORT void flashmla_pages_counts(const Pages* pages, Counts* counts) { *counts = pages->counts(); }
FLASHMLA_EXPORT int64_t flashmla_pages_n_free(const Pages* pages) { return pages->n_free(); }
FLASHMLA_EXPORT void flashmla_pages_states(const Pages* pages, uint8_t* states) { pages->states(states); }
// Pages that wait, and the last step that each waits for.
FLASHMLA_EXPORT int64_t flashmla_pages_deferred(const Pages* pages, int32_t* out, int64_t* steps) {
  for (const auto& [page, step] : pages->deferred()) *out++ = page, *steps++ = step;
  return static_cast<int64_t>(pages->deferred().size());
}
FLASHMLA_EXPORT void flashmla_pages_watch(Pages* pages) { pages->watch(); }
FLASHMLA_EXPORT int64_t flashmla_pages_n_freed(const Pages* pages) { return pages->n_freed(); }
FLASHMLA_EXPORT void flashmla_pages_freed(Pages* pages, int32_t* out) {
  const auto freed = pages->freed();
  std::copy(freed.begin(), freed.end(), out);
}

FLASHMLA_EXPORT BatchTables* flashmla_tables_new(int64_t b, int64_t most_pages, int32_t* lengths, int64_t* slots,
                                                 int64_t* sequences, int64_t* counts, int32_t* copies) {
  return new BatchTables{{}, most_pages, lengths, slots, sequences, counts, copies, std::vector<BatchTables::Row>(b)};
}
FLASHMLA_EXPORT void flashmla_tables_add(BatchTables* tables, int32_t* data, int64_t stride, int64_t parts) {
  tables->tables.push_back({data, stride, parts});
}
FLASHMLA_EXPORT void flashmla_tables_delete(BatchTables* tables) { delete tables; }

}  // extern "C"
