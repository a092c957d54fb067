// The books of a pool: which pages are free, who holds the others, and where each sequence's tokens lie. It holds no
// rows.
//
// A page that its last holder drops is handed out again once every step that was open then has closed: an open step may
// still read it. Pages of the prefix cache that nobody holds stay as they are until no other page is left, the one that
// was dropped longest ago first. Not thread-safe: the caller has a lock. Every method succeeds, or changes nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace flashmla::pool {

// A method found this wrong. `Found` says where, or how much.
enum Status : int32_t {
  kFine = 0,
  kOutOfPages = 1,    // `needed` pages
  kUnknown = 2,       // `index`: a sequence that was released, or a page without as many holders
  kRepeated = 3,      // `index`: a sequence that is named twice
  kTooLong = 4,       // `index`: more tokens than the tables are for
  kBadLength = 5,     // not a length of the sequence
  kStepsAreOpen = 6,  // and nothing may move
};

struct Found {
  int64_t index;
  int64_t needed;
  int64_t copies;  // pages to copy before anything is written
  int64_t behind;  // the last step that was opened before one of these pages was dropped; 0: none
};

struct Counts {
  int64_t n_free, n_used, n_evictable, n_deferred, n_reserved, n_shared;
  int64_t peak, evictions, rows, longest_free;  // rows: tokens that used pages hold; longest_free: neighbours
};

// The tensors of a batch, which stay where they are: row i of every table belongs to the i-th sequence of a step.
struct BatchTables {
  struct Table {
    int32_t* data;
    int64_t stride, parts;  // pages of a table are parts of the pool's: `parts` each
  };
  struct Row {
    int64_t sequence = -1;
    uint64_t changes = 0;
    int64_t written = 0;  // pages of the sequence that the tables have
  };
  std::vector<Table> tables;
  int64_t most_pages;
  int32_t* lengths;
  int64_t* slots;
  // The caller fills in sequences and counts for a step, and finds copies: pairs of pages, source and target.
  int64_t *sequences, *counts;
  int32_t* copies;
  std::vector<Row> rows;
};

class Pages {
public:
  Pages(int64_t n_pages, int64_t page_size);

  // Single pages, for whoever keeps no sequences. Pages are named as they are in block tables.
  Status allocate(int64_t count, int32_t* pages, Found& found);
  Status retain(const int32_t* pages, int64_t count, Found& found);
  Status release(const int32_t* pages, int64_t count, Found& found);

  int64_t open_sequence();
  Status fork(int64_t sequence, int64_t& child);
  // The first `count` of the pages that are still cached as of these generations, and which it held back: a new
  // sequence of `length` tokens, or of as many as they hold.
  int64_t adopt(const int32_t* pages, const uint64_t* generations, int64_t& count, int64_t length);
  Status truncate(int64_t sequence, int64_t length);
  Status close_sequence(int64_t sequence);
  Status reserve(int64_t sequence, int64_t tokens, Found& found);
  // Room for `counts[i]` more tokens in each of the `b` sequences of `tables`, and where they lie. With `behind`, pages
  // that open steps may still read are handed out too, after all others; the step must then be opened next.
  Status step(BatchTables& tables, int64_t b, bool behind, Found& found);
  // Count the rows of a step as written: the indices of sequences that filled a page, in `copies`, and how many.
  int64_t commit(BatchTables& tables, int64_t b);
  // The sequences are as long as they were before the step, at most, and nothing is reserved for them.
  void roll_back(const BatchTables& tables, int64_t b);
  bool can_take(int64_t count) const;

  int64_t open_step();
  void close_step(int64_t step);

  // Marks a held page as one that the prefix cache knows. Its generation, which is returned and goes with the page
  // where it moves, is no other page's and no other time's: what was cached before is never taken for it.
  uint64_t remember(int32_t page);
  bool remembers(int32_t page, uint64_t generation) const;
  void forget(int32_t page);

  // Pairs of pages, source and target, that would leave the used pages in front; and the move itself.
  Status plan_moves(std::vector<int32_t>& moves) const;
  Status move(const int32_t* moves, int64_t count);

  bool known(int64_t sequence) const;
  int64_t length(int64_t sequence) const { return at(sequence).length; }
  int64_t written(int64_t sequence) const { return at(sequence).written; }
  // Whether its next token would be written to a page of others, and is written to a copy.
  bool copies_tail(int64_t sequence) const { return others_tail(at(sequence)); }
  const std::vector<int32_t>& pages_of(int64_t sequence) const { return at(sequence).pages; }
  int64_t n_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t n_freed() const { return static_cast<int64_t>(freed_.size()); }
  int64_t references(int32_t page) const { return references_[page]; }
  Counts counts() const;
  // 0 free, 1 used, 2 shared, 3 evictable, 4 deferred.
  void states(uint8_t* states) const;
  const std::deque<std::pair<int32_t, int64_t>>& deferred() const { return deferred_; }
  // Pages that came to be free since the last call, if `watch` was called: their rows are nobody's.
  void watch() { watched_ = true; }
  std::vector<int32_t> freed() { return std::exchange(freed_, {}); }

private:
  struct Sequence {
    int64_t serial = 0;  // odd while it lives
    int64_t length = 0;
    int64_t written = 0;   // tokens whose rows are there, as far as steps have said
    uint64_t changes = 0;  // of pages that tables may have
    uint64_t seen = 0;     // by the call of this number
    std::vector<int32_t> pages;
  };

  Sequence& at(int64_t sequence) { return sequences_[sequence & kSlot]; }
  const Sequence& at(int64_t sequence) const { return sequences_[sequence & kSlot]; }
  int64_t last_step() const { return first_open_ + static_cast<int64_t>(open_.size()) - 1; }
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  void drop_from(Sequence& sequence, size_t kept);
  bool others_tail(const Sequence& sequence) const;
  void write_row(const Sequence& sequence, int64_t name, int64_t count, BatchTables& tables, int64_t row,
                 int64_t*& slot) const;

  bool can_take_behind(int64_t count) const;
  int32_t take(int64_t& behind);
  void drop(int32_t page);
  void lay_down(int32_t page, int64_t step);
  void put(int32_t page, int64_t step);
  void settle();
  void append_evictable(int32_t page, int64_t step);
  void remove_evictable(int32_t page);

  static constexpr int64_t kSlot = (int64_t{1} << 32) - 1;
  static constexpr int32_t kNone = -1;

  int64_t n_pages_, page_size_;
  std::vector<int32_t> references_, free_, next_, previous_;
  std::vector<uint64_t> generations_;  // of cached pages
  uint64_t remembered_ = 0;
  std::vector<int64_t> dropped_;  // the last step that was open or before, when a sequence dropped rows of a page
  std::vector<uint8_t> cached_;
  int32_t oldest_ = kNone, newest_ = kNone;  // evictable pages
  int64_t n_evictable_ = 0, n_used_ = 0, peak_ = 0, evictions_ = 0;

  std::deque<std::pair<int32_t, int64_t>>
      deferred_;              // pages, and the last step that was opened before they were dropped
  std::deque<uint8_t> open_;  // steps from `first_open_` on
  int64_t first_open_ = 1;    // older ones are closed; it is the next one if none is open

  std::vector<Sequence> sequences_;
  std::vector<int32_t> free_sequences_;
  uint64_t calls_ = 0;
  bool watched_ = false;
  std::vector<int32_t> freed_;
};

}  // namespace flashmla::pool
