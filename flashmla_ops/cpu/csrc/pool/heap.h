// Blocks of any size in one range of addresses, of which only offsets are known. Not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "pool/small_blocks.h"

namespace flashmla::pool {

class Heap {
public:
  struct Block {
    uint64_t offset;
    size_t size;   // what was taken for it, at least what was asked for
    size_t dirty;  // so many bytes from its start may have been written; the others are as fresh as the range was
  };

  // At most so many bytes. Raises std::bad_alloc if they cannot be counted.
  explicit Heap(size_t most_bytes) : large_(static_cast<uint32_t>(most_bytes / kUnit)), small_(large_) {}

  // More bytes behind the last one, a multiple of kUnit.
  void grow(size_t bytes) { large_.grow(static_cast<uint32_t>(bytes / kUnit)); }

  std::optional<Block> allocate(size_t bytes) {
    if (bytes > size()) return std::nullopt;
    Block block{};
    if (bytes > kLargestSmall || !small_.allocate(bytes, &block.offset)) {
      // A small block that finds no room for a span of its class may yet find room for itself.
      const auto units = static_cast<uint32_t>((std::max<size_t>(bytes, 1) + kUnit - 1) / kUnit);
      uint32_t start = large_.allocate(units);
      if (start == kNone && small_.close_empty()) start = large_.allocate(units);
      if (start == kNone) return std::nullopt;
      block.offset = start * uint64_t{kUnit};
    }
    block.size = size_at(block.offset);
    block.dirty = std::min<uint64_t>(block.size, touched_ - std::min(touched_, block.offset));
    touched_ = std::max(touched_, block.offset + block.size);
    blocks_++, in_use_ += block.size;
    peak_ = std::max(peak_, in_use_);
    return block;
  }

  // The size of the block that is in use at an offset; 0 if none starts there.
  size_t size_at(uint64_t offset) {
    const Tag tag = large_.tag(static_cast<uint32_t>(offset / kUnit));
    if (tag.kind == Tag::kSpan) return small_.size_at(tag.value, offset);
    return tag.kind == Tag::kUsed && offset % kUnit == 0 ? tag.value * kUnit : 0;
  }

  // Takes back the block that is in use at an offset.
  void release(uint64_t offset) {
    blocks_--, in_use_ -= size_at(offset);
    const auto unit = static_cast<uint32_t>(offset / kUnit);
    const Tag tag = large_.tag(unit);
    if (tag.kind == Tag::kSpan) {
      small_.release(tag.value, offset);
    } else {
      large_.release(unit, tag.value);
    }
  }

  size_t size() const { return large_.units() * kUnit; }
  size_t in_use() const { return in_use_; }
  size_t peak() const { return peak_; }
  size_t blocks() const { return blocks_; }
  size_t largest_free() const { return large_.largest_free() * kUnit; }
  size_t free_at_end() { return large_.free_at_end() * kUnit; }
  size_t free_blocks() const { return large_.free_blocks(); }

private:
  LargeBlocks large_;
  SmallBlocks small_;
  uint64_t touched_ = 0;  // nothing behind it was ever handed out
  size_t in_use_ = 0, peak_ = 0, blocks_ = 0;
};

}  // namespace flashmla::pool
