// The books of a pool under random operations, each followed by a look at the whole. Prints "good".
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "pool/pages.h"

using namespace flashmla::pool;

namespace {

constexpr int64_t kPages = 24, kPageSize = 3, kBatch = 4;

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

class Walk {
public:
  explicit Walk(uint32_t seed) : random_(seed), table_(kBatch * kPages), lengths_(kBatch), slots_(kPages * kPageSize) {
    names_.resize(kBatch), counts_.resize(kBatch), copies_.resize(2 * kBatch);
    tables_ = {{{table_.data(), kPages, 1}},
               kPages,
               lengths_.data(),
               slots_.data(),
               names_.data(),
               counts_.data(),
               copies_.data(),
               std::vector<BatchTables::Row>(kBatch)};
    pages_.watch();
  }

  void operate() {
    switch (below(12)) {
      case 0:
        sequences_.push_back(pages_.open_sequence());
        break;
      case 1:
      case 2:
      case 3:
      case 4:
        step();
        break;
      case 5:
        if (int64_t child; !sequences_.empty() && !pages_.fork(any(), child)) sequences_.push_back(child);
        break;
      case 6:
        if (!sequences_.empty()) truncate(any());
        break;
      case 7:
      case 8:
        if (!sequences_.empty()) close();
        break;
      case 9:
        if (!open_.empty()) end();
        break;
      case 10:
        if (!sequences_.empty()) remember(any());
        break;
      case 11:
        compact();
        break;
    }
    pages_.freed();
    check();
  }

private:
  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  int64_t any() { return sequences_[below(static_cast<int64_t>(sequences_.size()))]; }

  void step() {
    int64_t b = 0;
    for (const int64_t each : sequences_)
      if (b < kBatch && below(2)) names_[b] = each, counts_[b++] = below(7);
    Found found;
    const bool behind = below(4) == 0, fine = pages_.step(tables_, b, behind, found) == kFine;
    if (fine && below(2)) {
      if (below(3))
        pages_.commit(tables_, b);
      else
        pages_.roll_back(tables_, b);
    }
    if ((fine && behind) || open_.size() < 3) open_.push_back(pages_.open_step());
  }

  void truncate(int64_t name) { require(!pages_.truncate(name, below(pages_.length(name) + 1)), "truncate"); }

  void close() {
    const int64_t index = below(static_cast<int64_t>(sequences_.size())), name = sequences_[index];
    require(!pages_.close_sequence(name), "close");
    require(!pages_.known(name) && pages_.close_sequence(name) == kUnknown, "closed twice");
    sequences_.erase(sequences_.begin() + index);
  }

  void end() {
    const int64_t index = below(static_cast<int64_t>(open_.size()));
    pages_.close_step(open_[index]), pages_.close_step(open_[index]);
    open_.erase(open_.begin() + index);
  }

  void remember(int64_t name) {
    const auto& held = pages_.pages_of(name);
    const int64_t full = pages_.length(name) / kPageSize;
    std::vector<uint64_t> generations;
    for (int64_t i = 0; i < full; ++i) generations.push_back(pages_.remember(held[i]));
    const std::vector<int32_t> kept(held.begin(), held.begin() + full);
    if (below(2)) {
      int64_t count = full;
      sequences_.push_back(pages_.adopt(kept.data(), generations.data(), count, full * kPageSize));
      require(count == full, "adopt");
    } else if (full) {
      pages_.forget(kept[0]);
      require(!pages_.remembers(kept[0], generations[0]), "forget");
    }
  }

  void compact() {
    std::vector<int32_t> moves;
    const Status status = pages_.plan_moves(moves);
    require(status == (open_.empty() ? kFine : kStepsAreOpen), "compact");
    if (!status) pages_.move(moves.data(), static_cast<int64_t>(moves.size() / 2));
  }

  void check() {
    std::vector<int64_t> held(kPages);
    for (const int64_t name : sequences_) {
      const auto& pages = pages_.pages_of(name);
      require(static_cast<int64_t>(pages.size()) * kPageSize >= pages_.length(name), "a token without a page");
      for (const int32_t page : pages) ++held[page];
    }
    for (int32_t page = 0; page < kPages; ++page) require(pages_.references(page) == held[page], "references");
    const Counts counts = pages_.counts();
    require(counts.n_free + counts.n_used + counts.n_evictable + counts.n_deferred == kPages, "a page was lost");
    require(counts.n_deferred == 0 || !open_.empty(), "a page waits for nobody");
  }

  std::mt19937 random_;
  Pages pages_{kPages, kPageSize};
  std::vector<int32_t> table_, lengths_;
  std::vector<int64_t> slots_, names_, counts_;
  std::vector<int32_t> copies_;
  BatchTables tables_;
  std::vector<int64_t> sequences_, open_;
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t operations = argc > 1 ? std::atoll(argv[1]) : 1000;
  for (uint32_t seed = 0; seed < 4; ++seed) {
    Walk walk(seed);
    for (int64_t i = 0; i < operations / 4; ++i) walk.operate();
  }
  std::puts("good");
}
