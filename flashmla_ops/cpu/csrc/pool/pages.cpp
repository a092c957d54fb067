#include "pool/pages.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace flashmla::pool {

Pages::Pages(int64_t n_pages, int64_t page_size)
    : n_pages_(n_pages), page_size_(page_size), references_(n_pages), next_(n_pages, kNone), previous_(n_pages, kNone),
      generations_(n_pages), dropped_(n_pages), cached_(n_pages) {
  free_.reserve(n_pages);
  for (int64_t page = n_pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

// Pages.

bool Pages::can_take(int64_t count) const {
  count -= static_cast<int64_t>(free_.size());
  for (int32_t page = oldest_; count > 0 && page != kNone && dropped_[page] < first_open_; page = next_[page]) --count;
  return count <= 0;
}

bool Pages::can_take_behind(int64_t count) const {
  return count <= static_cast<int64_t>(free_.size() + deferred_.size()) + n_evictable_;
}

// The page freed last is handed out first, while it is warm in the processor's cache. There must be one. `behind` grows
// to the last step that may still read it.
int32_t Pages::take(int64_t& behind) {
  int32_t page;
  if (!free_.empty()) {
    page = free_.back(), free_.pop_back();
  } else {
    // Open steps may still read all pages that wait, but not what was dropped before they opened.
    const bool evicts = oldest_ != kNone && (dropped_[oldest_] < first_open_ || deferred_.empty());
    if (evicts) {
      page = oldest_;
      behind = std::max(behind, dropped_[page]);
      remove_evictable(page);
      cached_[page] = 0, ++evictions_;
    } else {
      page = deferred_.front().first;
      behind = std::max(behind, deferred_.front().second);
      deferred_.pop_front();
    }
    if (watched_) freed_.push_back(page);
  }
  references_[page] = 1;
  peak_ = std::max(peak_, ++n_used_);
  return page;
}

void Pages::drop(int32_t page) {
  dropped_[page] = last_step();
  if (--references_[page] == 0) lay_down(page, last_step());
}

// A page that nobody holds any more, and that steps up to this one may read.
void Pages::lay_down(int32_t page, int64_t step) {
  --n_used_;
  if (cached_[page])
    append_evictable(page, step);
  else
    put(page, step);
}

void Pages::put(int32_t page, int64_t step) {
  if (open_.empty()) {
    free_.push_back(page);
    if (watched_) freed_.push_back(page);
  } else {
    deferred_.emplace_back(page, step);
  }
}

void Pages::settle() {
  for (; !deferred_.empty() && deferred_.front().second < first_open_; deferred_.pop_front()) {
    free_.push_back(deferred_.front().first);
    if (watched_) freed_.push_back(deferred_.front().first);
  }
}

void Pages::append_evictable(int32_t page, int64_t step) {
  dropped_[page] = step;
  next_[page] = kNone, previous_[page] = newest_;
  (newest_ == kNone ? oldest_ : next_[newest_]) = page;
  newest_ = page;
  ++n_evictable_;
}

void Pages::remove_evictable(int32_t page) {
  (previous_[page] == kNone ? oldest_ : next_[previous_[page]]) = next_[page];
  (next_[page] == kNone ? newest_ : previous_[next_[page]]) = previous_[page];
  --n_evictable_;
}

Status Pages::allocate(int64_t count, int32_t* pages, Found& found) {
  found.needed = count;
  if (!can_take(count)) return kOutOfPages;
  int64_t behind = 0;
  for (int64_t i = 0; i < count; ++i) pages[i] = take(behind);
  return kFine;
}

Status Pages::retain(const int32_t* pages, int64_t count, Found& found) {
  for (int64_t i = 0; i < count; ++i) {
    found.index = i;
    if (pages[i] < 0 || pages[i] >= n_pages_ || references_[pages[i]] == 0) return kUnknown;
  }
  for (int64_t i = 0; i < count; ++i) ++references_[pages[i]];
  return kFine;
}

Status Pages::release(const int32_t* pages, int64_t count, Found& found) {
  // Counted down first, so that a page named more often than it is held is found before any goes.
  int64_t i = 0;
  for (; i < count; ++i) {
    if (pages[i] < 0 || pages[i] >= n_pages_ || references_[pages[i]] == 0) break;
    --references_[pages[i]];
  }
  for (int64_t j = 0; j < i; ++j) ++references_[pages[j]];
  found.index = i;
  if (i < count) return kUnknown;
  for (int64_t j = 0; j < count; ++j) drop(pages[j]);
  return kFine;
}

// Sequences.

bool Pages::known(int64_t sequence) const {
  const auto slot = static_cast<uint64_t>(sequence & kSlot);
  return sequence >= 0 && slot < sequences_.size() && sequences_[slot].serial == sequence >> 32 &&
         sequences_[slot].serial % 2 == 1;
}

int64_t Pages::open_sequence() {
  if (free_sequences_.empty()) {
    free_sequences_.push_back(static_cast<int32_t>(sequences_.size()));
    sequences_.emplace_back();
  }
  const int64_t slot = free_sequences_.back();
  free_sequences_.pop_back();
  Sequence& sequence = sequences_[slot];
  ++sequence.serial, ++sequence.changes;
  sequence.length = sequence.written = 0;
  return sequence.serial << 32 | slot;
}

Status Pages::fork(int64_t parent, int64_t& child) {
  if (!known(parent)) return kUnknown;
  child = open_sequence();  // may move all sequences
  const Sequence& from = at(parent);
  Sequence& to = at(child);
  to.length = from.length, to.written = from.written;
  // Pages reserved for later tokens stay the parent's own.
  to.pages.assign(from.pages.begin(), from.pages.begin() + pages_for(from.length));
  for (const int32_t page : to.pages) ++references_[page];
  return kFine;
}

int64_t Pages::adopt(const int32_t* pages, const uint64_t* generations, int64_t& count, int64_t length) {
  const int64_t name = open_sequence();
  Sequence& sequence = at(name);
  int64_t alive = 0;
  for (; alive < count; ++alive) {
    const int32_t page = pages[alive];
    if (!remembers(page, generations[alive])) break;
    if (references_[page]++ == 0) {
      remove_evictable(page);
      peak_ = std::max(peak_, ++n_used_);
    }
    sequence.pages.push_back(page);
  }
  count = alive;
  sequence.length = sequence.written = std::min(length, alive * page_size_);
  return name;
}

// The last ones first: they are the first to be evicted, and a cached page is reached by the pages before it.
void Pages::drop_from(Sequence& sequence, size_t kept) {
  for (; sequence.pages.size() > kept; sequence.pages.pop_back()) drop(sequence.pages.back());
}

Status Pages::truncate(int64_t name, int64_t length) {
  if (!known(name)) return kUnknown;
  Sequence& sequence = at(name);
  if (length < 0 || length > sequence.length) return kBadLength;
  const auto kept = static_cast<size_t>(pages_for(length));
  if (kept < sequence.pages.size()) {
    drop_from(sequence, kept);
    ++sequence.changes;
  }
  // Open steps may read the rows that are cut off.
  if (length < sequence.length && length % page_size_) dropped_[sequence.pages[kept - 1]] = last_step();
  sequence.length = length;
  sequence.written = std::min(sequence.written, length);
  return kFine;
}

Status Pages::close_sequence(int64_t name) {
  if (!known(name)) return kUnknown;
  Sequence& sequence = at(name);
  drop_from(sequence, 0);
  ++sequence.serial;
  free_sequences_.push_back(static_cast<int32_t>(name & kSlot));
  return kFine;
}

Status Pages::reserve(int64_t name, int64_t tokens, Found& found) {
  if (!known(name)) return kUnknown;
  Sequence& sequence = at(name);
  const int64_t missing = pages_for(sequence.length + tokens) - static_cast<int64_t>(sequence.pages.size());
  found.needed = std::max<int64_t>(missing, 0);
  if (!can_take(found.needed)) return kOutOfPages;
  int64_t behind = 0;
  for (int64_t i = 0; i < missing; ++i) sequence.pages.push_back(take(behind));
  return kFine;
}

// Whether the next token would be written to a page of others: of sequences, or of an open step that has read it
// through a sequence which dropped it since.
bool Pages::others_tail(const Sequence& sequence) const {
  if (sequence.length % page_size_ == 0) return false;
  const int32_t page = sequence.pages[sequence.length / page_size_];
  return references_[page] > 1 || dropped_[page] >= first_open_;
}

Status Pages::step(BatchTables& tables, int64_t b, bool behind, Found& found) {
  const int64_t *names = tables.sequences, *counts = tables.counts;
  int32_t* copies = tables.copies;
  found = {0, 0, 0, 0};
  ++calls_;
  for (int64_t i = 0; i < b; ++i) {
    found.index = i;
    if (!known(names[i])) return kUnknown;
    Sequence& sequence = at(names[i]);
    if (std::exchange(sequence.seen, calls_) == calls_) return kRepeated;
    if (tables.most_pages < n_pages_ && pages_for(sequence.length + counts[i]) > tables.most_pages) return kTooLong;
  }
  // A step that goes behind others, the next to be opened, copies pages late.
  const int64_t reader = last_step() + (behind && !open_.empty());
  // Where nobody else holds a page, the last of its writers keeps it: the writers before have dropped it already.
  for (int64_t i = 0; i < b; ++i) {
    const Sequence& sequence = at(names[i]);
    const int64_t missing = pages_for(sequence.length + counts[i]) - static_cast<int64_t>(sequence.pages.size());
    found.needed += std::max<int64_t>(missing, 0);
    if (counts[i] && others_tail(sequence)) {
      const int32_t tail = sequence.pages[sequence.length / page_size_];
      --references_[tail], dropped_[tail] = reader;
      copies[2 * found.copies++] = static_cast<int32_t>(i);
    }
  }
  found.needed += found.copies;
  const bool fits = behind ? can_take_behind(found.needed) : can_take(found.needed);
  for (int64_t j = 0; j < found.copies && !fits; ++j) {
    const Sequence& sequence = at(names[copies[2 * j]]);
    ++references_[sequence.pages[sequence.length / page_size_]];
  }
  if (!fits) return kOutOfPages;

  for (int64_t j = 0; j < found.copies; ++j) {
    Sequence& sequence = at(names[copies[2 * j]]);
    int32_t& tail = sequence.pages[sequence.length / page_size_];
    copies[2 * j] = tail;
    copies[2 * j + 1] = tail = take(found.behind);
    ++sequence.changes;
  }
  int64_t* slot = tables.slots;
  for (int64_t i = 0; i < b; ++i) {
    Sequence& sequence = at(names[i]);
    if (counts[i] && sequence.length % page_size_) {
      const int32_t tail = sequence.pages[sequence.length / page_size_];
      cached_[tail] = 0;  // its rows change: it is no longer what was cached
    }
    sequence.length += counts[i];
    for (int64_t left = pages_for(sequence.length) - static_cast<int64_t>(sequence.pages.size()); left > 0; --left)
      sequence.pages.push_back(take(found.behind));
    write_row(sequence, names[i], counts[i], tables, i, slot);
  }
  // Not before: these pages are still to be copied.
  for (int64_t j = 0; j < found.copies; ++j) {
    const int32_t source = copies[2 * j];
    bool first = references_[source] == 0;
    for (int64_t k = 0; k < j && first; ++k) first = copies[2 * k] != source;
    if (first) lay_down(source, reader);
  }
  return kFine;
}

void Pages::write_row(const Sequence& sequence, int64_t name, int64_t count, BatchTables& tables, int64_t i,
                      int64_t*& slot) const {
  BatchTables::Row& row = tables.rows[i];
  if (row.sequence != name || row.changes != sequence.changes) row = {name, sequence.changes, 0};
  const int64_t n = pages_for(sequence.length);
  for (const BatchTables::Table& table : tables.tables) {
    int32_t* out = table.data + i * table.stride + row.written * table.parts;
    for (int64_t page = row.written; page < n; ++page)
      for (int64_t part = 0; part < table.parts; ++part)
        *out++ = static_cast<int32_t>(sequence.pages[page] * table.parts + part);
  }
  row.written = std::max(row.written, n);
  tables.lengths[i] = static_cast<int32_t>(sequence.length);
  int64_t position = sequence.length - count;
  while (position < sequence.length) {
    const int64_t offset = position % page_size_, end = std::min(sequence.length, position - offset + page_size_);
    int64_t at = sequence.pages[position / page_size_] * page_size_ + offset;
    for (; position < end; ++position) *slot++ = at++;
  }
}

// Steps.

int64_t Pages::commit(BatchTables& tables, int64_t b) {
  int64_t n = 0;
  for (int64_t i = 0; i < b; ++i) {
    if (!known(tables.sequences[i])) continue;
    Sequence& sequence = at(tables.sequences[i]);
    const int64_t end = tables.lengths[i], start = end - tables.counts[i];
    if (sequence.written != start || sequence.length < end) continue;
    sequence.written = end;
    if (end / page_size_ > start / page_size_) tables.copies[n++] = static_cast<int32_t>(i);
  }
  return n;
}

void Pages::roll_back(const BatchTables& tables, int64_t b) {
  for (int64_t i = 0; i < b; ++i) {
    const int64_t name = tables.sequences[i], start = tables.lengths[i] - tables.counts[i];
    if (known(name) && length(name) > start) truncate(name, start);
  }
}

int64_t Pages::open_step() {
  open_.push_back(1);
  return first_open_ + static_cast<int64_t>(open_.size()) - 1;
}

void Pages::close_step(int64_t step) {
  const int64_t index = step - first_open_;
  if (index < 0 || index >= static_cast<int64_t>(open_.size())) return;
  open_[index] = 0;
  for (; !open_.empty() && !open_.front(); open_.pop_front()) ++first_open_;
  settle();
}

// The prefix cache.

uint64_t Pages::remember(int32_t page) {
  cached_[page] = 1;
  return generations_[page] = ++remembered_;
}

bool Pages::remembers(int32_t page, uint64_t generation) const {
  return cached_[page] && generations_[page] == generation;
}

void Pages::forget(int32_t page) {
  if (!std::exchange(cached_[page], 0)) return;
  if (references_[page]) return;
  remove_evictable(page);
  put(page, last_step());
}

// Compaction.

Status Pages::plan_moves(std::vector<int32_t>& moves) const {
  if (!open_.empty()) return kStepsAreOpen;
  const int64_t kept = n_pages_ - static_cast<int64_t>(free_.size());
  std::vector<int32_t> targets;
  for (const int32_t page : free_)
    if (page < kept) targets.push_back(page);
  std::sort(targets.begin(), targets.end(), std::greater<>());
  std::vector<uint8_t> is_free(n_pages_);
  for (const int32_t page : free_) is_free[page] = 1;
  for (int64_t page = kept; page < n_pages_; ++page) {
    if (is_free[page]) continue;
    moves.push_back(static_cast<int32_t>(page)), moves.push_back(targets.back());
    targets.pop_back();
  }
  return kFine;
}

Status Pages::move(const int32_t* moves, int64_t count) {
  std::vector<int32_t> now(n_pages_);
  for (int64_t page = 0; page < n_pages_; ++page) now[page] = static_cast<int32_t>(page);
  for (int64_t i = 0; i < count; ++i) now[moves[2 * i]] = moves[2 * i + 1];
  for (Sequence& sequence : sequences_) {
    for (int32_t& page : sequence.pages) page = now[page];
    ++sequence.changes;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t from = moves[2 * i], to = moves[2 * i + 1];
    std::swap(references_[from], references_[to]);
    std::swap(cached_[from], cached_[to]);
    generations_[to] = generations_[from];
    dropped_[to] = dropped_[from];
    if (references_[to] == 0) {  // evictable: the same place in their order
      next_[to] = next_[from], previous_[to] = previous_[from];
      (previous_[to] == kNone ? oldest_ : next_[previous_[to]]) = to;
      (next_[to] == kNone ? newest_ : previous_[next_[to]]) = to;
    }
  }
  std::vector<uint8_t> gone(n_pages_);
  for (int64_t i = 0; i < count; ++i) gone[moves[2 * i + 1]] = 1;
  std::erase_if(free_, [&](int32_t page) { return gone[page]; });
  for (int64_t i = 0; i < count; ++i) {
    free_.push_back(moves[2 * i]);
    if (watched_) freed_.push_back(moves[2 * i]);
  }
  // The first ones are handed out first, so that what is free stays together.
  std::sort(free_.begin(), free_.end(), std::greater<>());
  return kFine;
}

// Observing.

Counts Pages::counts() const {
  Counts counts{};
  counts.n_free = static_cast<int64_t>(free_.size()), counts.n_used = n_used_, counts.n_evictable = n_evictable_;
  counts.n_deferred = static_cast<int64_t>(deferred_.size()), counts.peak = peak_, counts.evictions = evictions_;
  std::vector<int32_t> rows(n_pages_);
  for (const Sequence& sequence : sequences_) {
    for (int64_t i = 0; i < static_cast<int64_t>(sequence.pages.size()); ++i) {
      const int64_t held = std::clamp<int64_t>(sequence.length - i * page_size_, 0, page_size_);
      counts.n_reserved += held == 0;
      int32_t& most = rows[sequence.pages[i]];
      most = std::max(most, static_cast<int32_t>(held));
    }
  }
  std::vector<uint8_t> kinds(n_pages_);
  states(kinds.data());
  int64_t run = 0;
  for (int64_t page = 0; page < n_pages_; ++page) {
    counts.rows += rows[page];
    counts.n_shared += references_[page] > 1;
    run = kinds[page] == 0 ? run + 1 : 0;
    counts.longest_free = std::max(counts.longest_free, run);
  }
  return counts;
}

void Pages::states(uint8_t* kinds) const {
  for (int64_t page = 0; page < n_pages_; ++page)
    kinds[page] = references_[page] > 1 ? 2 : references_[page] == 1 ? 1 : cached_[page] ? 3 : 0;
  for (const auto& [page, step] : deferred_) kinds[page] = 4;
}

}  // namespace flashmla::pool
