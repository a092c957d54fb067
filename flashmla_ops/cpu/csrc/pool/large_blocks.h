// Large blocks of a range: best fit, and neighbours that are free become one.
//
// The range is counted in units, and only tags beside it are touched, never itself: it may be a device's memory.
#pragma once

#include <cstdint>
#include <new>
#include <set>
#include <utility>

#include "pool/memory.h"

namespace flashmla::pool {

constexpr size_t kUnit = 1024;  // bytes
constexpr uint32_t kNone = UINT32_MAX;

// Says what lies at a unit. It is written at the first and the last unit of a free block, at the first of a used one,
// and at all units of a span (small_blocks.h).
struct Tag {
  enum Kind : uint32_t { kInner, kFree, kUsed, kSpan };
  uint32_t kind;
  uint32_t value;  // a block's units, or a span's number
};

class LargeBlocks {
public:
  // Raises std::bad_alloc if there is no address space for the tags.
  explicit LargeBlocks(uint32_t most_units) : tags_(round_up(most_units * sizeof(Tag), kPage), kPage) {
    if (!tags_ || !tags_.commit(0, tags_.bytes())) throw std::bad_alloc();
  }

  Tag& tag(uint32_t unit) { return reinterpret_cast<Tag*>(tags_.base())[unit]; }
  uint32_t units() const { return units_; }
  uint32_t largest_free() const { return free_.empty() ? 0 : free_.rbegin()->first; }
  uint32_t free_at_end() { return units_ > 0 && tag(units_ - 1).kind == Tag::kFree ? tag(units_ - 1).value : 0; }
  size_t free_blocks() const { return free_.size(); }

  // More units behind the last one.
  void grow(uint32_t count) {
    units_ += count;
    insert(units_ - count, count);
  }

  // The first unit of a block: the smallest free one that is large enough, at the lowest place. kNone if there is none.
  uint32_t allocate(uint32_t count) {
    auto found = free_.lower_bound({count, 0});
    if (found == free_.end()) return kNone;
    auto node = free_.extract(found);
    const auto [size, start] = node.value();
    if (size > count) put(std::move(node), start + count, size - count);
    mark(start, count, Tag::kUsed);
    return start;
  }

  // Takes back the block of `count` units that starts there.
  void release(uint32_t start, uint32_t count) {
    mark(start, count, Tag::kInner);
    insert(start, count);
  }

private:
  using Free = std::set<std::pair<uint32_t, uint32_t>>;  // by size, then by place
  static constexpr size_t kPage = 65536;                 // a multiple of the pages of any system

  void insert(uint32_t start, uint32_t count) {
    Free::node_type node;
    if (start + count < units_ && tag(start + count).kind == Tag::kFree) {
      node = free_.extract({tag(start + count).value, start + count});
      mark(start + count, node.value().first, Tag::kInner);
      count += node.value().first;
    }
    if (start > 0 && tag(start - 1).kind == Tag::kFree) {
      const uint32_t before = tag(start - 1).value;
      node = free_.extract({before, start - before});
      start -= before, count += before;
      mark(start, before, Tag::kInner);
    }
    put(std::move(node), start, count);
  }

  // Enters a free block, in a node of the set that is at hand, if one is.
  void put(Free::node_type node, uint32_t start, uint32_t count) {
    mark(start, count, Tag::kFree);
    if (node.empty()) {
      free_.emplace(count, start);
    } else {
      node.value() = {count, start};
      free_.insert(std::move(node));
    }
  }

  void mark(uint32_t start, uint32_t count, Tag::Kind kind) {
    tag(start + count - 1) = {kind == Tag::kUsed ? Tag::kInner : kind, count};
    tag(start) = {kind, count};
  }

  Reservation tags_;
  uint32_t units_ = 0;
  Free free_;
};

}  // namespace flashmla::pool
