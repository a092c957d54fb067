// Small blocks: size classes, each in spans that are large blocks cut into equal parts.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <vector>

#include "pool/large_blocks.h"

namespace flashmla::pool {

constexpr size_t kSmallest = 64;
constexpr size_t kLargestSmall = 8192;

// Classes are the multiples of 64 bytes up to 512, then four for each doubling: 640, 768, 896, 1024, 1280 ...
constexpr uint32_t class_of(size_t bytes) {
  const size_t n = (bytes + kSmallest - 1) / kSmallest;
  if (n <= 8) return static_cast<uint32_t>(n < 1 ? 0 : n - 1);
  const int shift = static_cast<int>(std::bit_width(n - 1)) - 3;  // n - 1 in [4, 8) << shift
  return static_cast<uint32_t>(4 * shift + static_cast<int>((n - 1) >> shift));
}
constexpr size_t class_bytes(uint32_t index) {
  if (index < 8) return (index + 1) * kSmallest;
  const uint32_t shift = index / 4 - 1;
  return kSmallest * ((index % 4 + 5) << shift);
}
constexpr uint32_t kClasses = class_of(kLargestSmall) + 1;
static_assert(class_bytes(kClasses - 1) == kLargestSmall);

class SmallBlocks {
public:
  explicit SmallBlocks(LargeBlocks& large) : large_(large) { partial_.fill(kNone); }

  // The byte offset of a block of at least so many bytes; false if a span is needed and cannot be had.
  bool allocate(size_t bytes, uint64_t* offset) {
    const uint32_t index = class_of(bytes);
    if (partial_[index] == kNone && !open_span(index)) return false;
    const uint32_t number = partial_[index];
    Span& span = spans_[number];
    while (span.free[span.hint] == 0) span.hint++;
    const auto bit = static_cast<uint32_t>(std::countr_zero(span.free[span.hint]));
    span.free[span.hint] &= span.free[span.hint] - 1;
    if (++span.used == capacity(index)) unlink(number);
    *offset = span.start * kUnit + (span.hint * 64 + bit) * class_bytes(index);
    return true;
  }

  // The size of the block at an offset within a span; 0 if no block that is in use starts there.
  size_t size_at(uint32_t number, uint64_t offset) const {
    const Span& span = spans_[number];
    const uint64_t within = offset - span.start * kUnit, bytes = class_bytes(span.index), slot = within / bytes;
    const bool used = within % bytes == 0 && slot < capacity(span.index) && !(span.free[slot / 64] >> slot % 64 & 1);
    return used ? bytes : 0;
  }

  // Takes back the block at an offset. A span without blocks is kept only if it is the last one with room.
  void release(uint32_t number, uint64_t offset) {
    Span& span = spans_[number];
    const auto slot = static_cast<uint32_t>((offset - span.start * kUnit) / class_bytes(span.index));
    span.free[slot / 64] |= uint64_t{1} << slot % 64;
    if (slot / 64 < span.hint) span.hint = slot / 64;
    if (span.used-- == capacity(span.index)) link(number);
    if (span.used == 0 && (span.next != kNone || span.previous != kNone)) close_span(number);
  }

  // Gives up the spans without blocks. False if there were none.
  bool close_empty() {
    bool closed = false;
    for (uint32_t first : partial_) {
      for (uint32_t number = first, next; number != kNone; number = next) {
        next = spans_[number].next;
        if (spans_[number].used == 0) close_span(number), closed = true;
      }
    }
    return closed;
  }

private:
  static constexpr uint32_t kSpanUnits = 64;
  static constexpr uint32_t capacity(uint32_t index) {
    return static_cast<uint32_t>(kSpanUnits * kUnit / class_bytes(index));
  }
  struct Span {
    uint32_t start, index, used, hint;  // first unit, class, blocks in use, first word of `free` that may not be zero
    uint32_t previous, next;            // spans of the class that have room
    std::array<uint64_t, kSpanUnits * kUnit / kSmallest / 64> free;  // a bit for each block
  };

  bool open_span(uint32_t index) {
    const uint32_t start = large_.allocate(kSpanUnits);
    if (start == kNone) return false;
    uint32_t number = static_cast<uint32_t>(spans_.size());
    if (unused_.empty()) {
      spans_.emplace_back();
    } else {
      number = unused_.back();
      unused_.pop_back();
    }
    Span& span = spans_[number] = {start, index, 0, 0, kNone, kNone, {}};
    for (uint32_t slot = 0; slot < capacity(index); slot++) span.free[slot / 64] |= uint64_t{1} << slot % 64;
    for (uint32_t unit = 0; unit < kSpanUnits; unit++) large_.tag(start + unit) = {Tag::kSpan, number};
    link(number);
    return true;
  }

  void close_span(uint32_t number) {
    unlink(number);
    for (uint32_t unit = 0; unit < kSpanUnits; unit++) large_.tag(spans_[number].start + unit) = {};
    large_.release(spans_[number].start, kSpanUnits);
    unused_.push_back(number);
  }

  void link(uint32_t number) {
    uint32_t& first = partial_[spans_[number].index];
    spans_[number].previous = kNone, spans_[number].next = first;
    if (first != kNone) spans_[first].previous = number;
    first = number;
  }

  void unlink(uint32_t number) {
    Span& span = spans_[number];
    if (span.next != kNone) spans_[span.next].previous = span.previous;
    (span.previous == kNone ? partial_[span.index] : spans_[span.previous].next) = span.next;
    span.previous = span.next = kNone;
  }

  LargeBlocks& large_;
  std::vector<Span> spans_;
  std::vector<uint32_t> unused_;            // numbers of spans that are no more
  std::array<uint32_t, kClasses> partial_;  // by class, a span with room
};

}  // namespace flashmla::pool
