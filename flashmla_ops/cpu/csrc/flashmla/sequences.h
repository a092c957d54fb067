// Attention of sequences that have queries, keys and windows of their own: prefill, ragged decode, windows, and results
// that must not depend on the batch. (Decode over whole sequences has a schedule: see decode.h.)
//
// An item is a block of query rows of one KV head, over the tokens that any of them sees. Long items are cut into
// pieces, and each is merged from its pieces. A thread takes whole items, or pieces of those that would take one thread
// longer than its share; which of the two changes no bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <tuple>
#include <vector>

#include "flashmla/arena.h"
#include "flashmla/dispatch.h"
#include "flashmla/schedule.h"
#include "flashmla/turns.h"

namespace flashmla {

class Sequences {
public:
  // Call i attends sequence `sequence` of its b sequences.
  struct Sequence {
    FlashmlaDecode call;
    int64_t sequence, length;
  };

  // Lists that the calling thread keeps, so that a call in steady state allocates nothing.
  static std::vector<Sequence>& kept() {
    static thread_local std::vector<Sequence> sequences;
    sequences.clear();
    return sequences;
  }

  // The sequences of one call: dtype, heads, levels and whatever else is no sequence's own are equal.
  Sequences(const std::vector<Sequence>& sequences, int64_t num_threads)
      : sequences_(sequences), kernels_(kernels()), num_threads_(num_threads) {
    works_.clear(), units_.clear();
    if (sequences_.empty()) return;
    const FlashmlaDecode& any = sequences_[0].call;
    stride_ = kernels_.accumulator_stride(any.d_v);
    for (const Sequence& sequence : sequences_) add(sequence);
    int64_t total = 0;
    for (const Work& work : works_) total += work.cost();
    if (total * (any.d_qk + any.d_v) < kSerial) num_threads_ = 1;
    // The longest first: threads then end at about the same time.
    std::sort(works_.begin(), works_.end(), [](const Work& a, const Work& b) {
      return std::tuple(-a.cost(), a.call, a.item.kv_head, a.item.row) <
             std::tuple(-b.cost(), b.call, b.item.kv_head, b.item.row);
    });
    const int64_t share = std::max<int64_t>(total / num_threads_, 1);
    const bool whole = works_.empty() || works_[0].cost() * kShare <= share || is_balanced(total);
    for (Work& work : works_) cut(work, whole ? INT64_MAX : share);
    std::sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) {
      return std::tuple(-a.cost, a.work, a.piece) < std::tuple(-b.cost, b.work, b.piece);
    });
  }

  // False if a thread could not get its memory, or met a page that the cache does not have (then `bad_page`).
  bool run(const FlashmlaRuntime& runtime) {
    if (floats_ > 0) {
      char* memory = results().reserve(size_t(floats_) * sizeof(float));
      if (memory == nullptr) return false;
      results_ = reinterpret_cast<float*>(memory);
    }
    const FlashmlaRuntime threads{num_threads_, runtime.parallel};
    if (!in_turns(threads, int64_t(units_.size()), [this](int64_t i) { return attend(units_[size_t(i)]); }))
      return false;
    return floats_ == 0 || in_turns(threads, int64_t(works_.size()) * kMerges, [this](int64_t i) {
             return merge(works_[size_t(i / kMerges)], i % kMerges * kMergeRows);
           });
  }

  FlashmlaFootprint footprint() const {
    FlashmlaFootprint largest{};
    int64_t pieces = 1;
    for (const Work& work : works_) {
      const ScratchBytes scratch = kernels_.scratch_bytes(*work.call, work.item);
      largest.scores = std::max(largest.scores, scratch.scores);
      largest.copies = std::max(largest.copies, scratch.copies);
      if (!work.apart) pieces = std::max(pieces, work.pieces);
    }
    const int64_t threads = std::min(num_threads_, int64_t(units_.size()));
    const int64_t outputs = threads * pieces * floats(Schedule::kMaxRows) + floats_;
    return {largest.scores * threads, largest.copies * threads, outputs * int64_t{sizeof(float)}};
  }

  std::atomic<bool> bad_page{false};

private:
  static constexpr int64_t kMinTokens = 256;         // a piece is not made shorter than this
  static constexpr int64_t kShare = 4;               // an item of more than a thread's share / kShare is cut,
  static constexpr int64_t kUneven = 16;             // unless whole items are no more uneven than this anyway
  static constexpr int64_t kInvariantTokens = 1024;  // the same where cuts depend on the sequence alone,
  static constexpr int64_t kInvariantPieces = 16;    // of which there are so many pieces at most
  static constexpr int64_t kMergeRows = 16;          // query rows that are merged at a time
  static constexpr int64_t kSerial = 1 << 18;        // multiply-adds that cost less than waking a thread
  static constexpr int64_t kMerges = Schedule::kMaxRows / kMergeRows;

  // An item, and the tokens [begin, end) that its rows see. Piece i ends at the i-th multiple of `step` after `begin`.
  struct Work {
    const FlashmlaDecode* call;
    Item item;
    int64_t begin, end, step, pieces;
    bool apart;      // its pieces are units of their own, kept until they are merged
    int64_t result;  // where the first of them is kept, in floats

    int64_t cost() const { return item.rows * (end - begin + 1); }
    Tokens piece(int64_t i) const {
      const int64_t first = begin / step + i;
      return {std::max(begin, first * step), std::min(end, (first + 1) * step)};
    }
  };
  // What a thread takes at a time: an item, or a piece of it.
  struct Unit {
    int64_t work, piece, cost;
  };

  static Arena& results() {
    static thread_local Arena arena;
    return arena;
  }
  static Arena& scratch() {
    static thread_local Arena arena;
    return arena;
  }

  static int64_t round_up(int64_t n, int64_t step) { return Schedule::divide_up(n, step) * step; }
  static int64_t padded(int64_t rows) { return round_up(rows, Schedule::kRowStep); }
  int64_t floats(int64_t rows) const { return padded(rows) * (stride_ + 2); }
  Accumulator accumulator(float* memory, int64_t rows) const {
    return {memory + 2 * padded(rows), memory, memory + padded(rows), stride_};
  }

  void add(const Sequence& sequence) {
    const FlashmlaDecode& call = sequence.call;
    const int64_t rows = call.s_q * group_size(call);
    int64_t block = Schedule::kMaxRows;
    if (call.levels == 3 && !call.batch_invariant) {  // fewer rows where there would not be an item for each thread
      const int64_t blocks = Schedule::divide_up(num_threads_, int64_t(sequences_.size()) * call.h_kv);
      block = std::min(round_up(Schedule::divide_up(rows, blocks), Schedule::kRowStep), block);
    }
    for (int64_t head = 0; head < call.h_kv; head++) {
      for (int64_t row = 0; row < rows; row += block) {
        const Item item{sequence.sequence, head, row, std::min(block, rows - row), sequence.length};
        const int64_t end = std::clamp<int64_t>(visible(call, item, row + item.rows - 1).end, 0, item.length);
        const int64_t begin = std::min(visible(call, item, row).begin, end);
        works_.push_back({&call, item, begin, end, std::max<int64_t>(end, 1), 1, false, 0});
      }
    }
  }

  // Whether threads that take whole items, the longest first, end at about the same time.
  bool is_balanced(int64_t total) const {
    std::vector<int64_t>& loads = kept_loads();  // a heap: the thread that is done first is on top
    loads.assign(size_t(num_threads_), 0);
    for (const Work& work : works_) {
      std::pop_heap(loads.begin(), loads.end(), std::greater<>());
      loads.back() += work.cost();
      std::push_heap(loads.begin(), loads.end(), std::greater<>());
    }
    return *std::max_element(loads.begin(), loads.end()) * num_threads_ <= total + total / kUneven;
  }

  // Items that would take a thread long beside its share of the work are cut.
  void cut(Work& work, int64_t share) {
    const int64_t tokens = work.end - work.begin;
    if (work.call->batch_invariant && work.call->levels == 3) {
      const int64_t step = Schedule::divide_up(work.item.length, kInvariantPieces);
      work.step = std::max(round_up(step, Schedule::kUnit), kInvariantTokens);
    } else if (work.call->levels == 3 && work.cost() * kShare > share && num_threads_ > 1) {
      const int64_t pieces =
          std::min(Schedule::divide_up(work.cost() * kShare, share), FLASHMLA_MAX_PARTS - int64_t{1});
      work.step = std::max(round_up(Schedule::divide_up(tokens, pieces), Schedule::kUnit), kMinTokens);
    }
    work.pieces = std::max<int64_t>(Schedule::divide_up(work.end, work.step) - work.begin / work.step, 1);
    work.apart = work.pieces > 1 && num_threads_ > 1 && work.cost() * kShare > share;
    const int64_t index = &work - works_.data();
    if (!work.apart) return units_.push_back({index, 0, work.cost()});
    work.result = floats_, floats_ += work.pieces * floats(work.item.rows);
    for (int64_t i = 0; i < work.pieces; i++) units_.push_back({index, i, work.cost() / work.pieces});
  }

  // An item, or a piece of it. False if there is no memory, or a page that the cache does not have.
  bool attend(const Unit& unit) {
    const Work& work = works_[size_t(unit.work)];
    const int64_t kept = work.apart ? 0 : work.pieces, each = floats(work.item.rows);
    const int64_t bytes = kernels_.scratch_bytes(*work.call, work.item).all();
    char* memory = scratch().reserve(size_t(kept * each) * sizeof(float) + size_t(bytes));
    if (memory == nullptr) return false;
    char* rest = memory + size_t(kept * each) * sizeof(float);
    if (work.apart) return attend(work, unit.piece, piece_of(work, unit.piece), rest);
    Accumulator parts[kInvariantPieces];
    for (int64_t piece = 0; piece < work.pieces; piece++) {
      parts[piece] = accumulator(reinterpret_cast<float*>(memory) + piece * each, work.item.rows);
      if (!attend(work, piece, parts[piece], rest)) return false;
    }
    kernels_.finish(*work.call, work.item, parts, work.pieces, 0, work.item.rows);
    return true;
  }
  bool attend(const Work& work, int64_t piece, const Accumulator& into, char* memory) {
    const Tokens tokens = work.piece(piece);
    if (kernels_.attend(*work.call, work.item, tokens.begin, tokens.end, into, memory)) return true;
    bad_page = true;
    return false;
  }

  // Rows from `begin` on of an item whose pieces are apart.
  bool merge(const Work& work, int64_t begin) const {
    if (!work.apart || begin >= work.item.rows) return true;
    Accumulator parts[FLASHMLA_MAX_PARTS];
    for (int64_t piece = 0; piece < work.pieces; piece++) parts[piece] = piece_of(work, piece);
    kernels_.finish(*work.call, work.item, parts, work.pieces, begin, std::min(begin + kMergeRows, work.item.rows));
    return true;
  }
  Accumulator piece_of(const Work& work, int64_t piece) const {
    return accumulator(results_ + work.result + piece * floats(work.item.rows), work.item.rows);
  }

  static std::vector<Work>& kept_works() {
    static thread_local std::vector<Work> works;
    return works;
  }
  static std::vector<Unit>& kept_units() {
    static thread_local std::vector<Unit> units;
    return units;
  }

  static std::vector<int64_t>& kept_loads() {
    static thread_local std::vector<int64_t> loads;
    return loads;
  }

  const std::vector<Sequence>& sequences_;
  const Kernels& kernels_;
  int64_t num_threads_;
  int64_t stride_ = 0;
  std::vector<Work>& works_ = kept_works();
  std::vector<Unit>& units_ = kept_units();
  int64_t floats_ = 0;  // of the pieces that are kept
  float* results_ = nullptr;
};

}  // namespace flashmla
