// How summaries of pages lie in memory: flashmla_ops/sparsity/summaries, which defines them.
#pragma once

#include <cstdint>
#include <string_view>

namespace flashmla {

enum SummaryKind : int32_t { SUMMARY_CODES = 0, SUMMARY_BOXES = 1, SUMMARY_SPREAD = 2, SUMMARY_SIGNS = 3 };
constexpr std::string_view kSummaryNames[] = {"codes", "boxes", "spread", "signs"};

constexpr int64_t kPlanes = 128, kSignBytes = kPlanes / 8;  // of "signs"
constexpr int64_t kCodesHeader = 16;                        // bytes before the box of "codes"

inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Where the parts of "codes" begin, for keys of d elements: in bytes.
struct CodesLayout {
  int64_t elements, tokens;  // padded

  CodesLayout(int64_t page_size, int64_t d) : elements(rounded_up(d, 8)), tokens(rounded_up(page_size, 16)) {}
  int64_t step() const { return kCodesHeader + 2 * elements; }
  int64_t words() const { return kCodesHeader + 4 * elements; }
  int64_t bytes() const { return words() + elements / 2 * tokens; }
};

inline int32_t summary_number(std::string_view kind) {
  for (int32_t i = 0; i < 4; i++) {
    if (kind == kSummaryNames[i]) return i;
  }
  return -1;
}
inline int64_t summary_bytes(std::string_view kind, int64_t page_size, int64_t d) {
  switch (summary_number(kind)) {
    case SUMMARY_CODES:
      return CodesLayout(page_size, d).bytes();
    case SUMMARY_SIGNS:
      return 2 * d + (2 + kSignBytes) * page_size;
    default:
      return 4 * d;
  }
}
inline int64_t summary_planes(std::string_view kind) { return kind == "signs" ? kPlanes : 0; }

}  // namespace flashmla
