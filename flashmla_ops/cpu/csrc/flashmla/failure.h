// What a function of the C interface returns when it fails: 1, and why.
#pragma once

#include <cstdio>

#include "flashmla/interface.h"

namespace flashmla {

inline int fail(char* message, const char* op, const char* argument, const char* expected, const char* actual) {
  std::snprintf(message, FLASHMLA_MESSAGE, "flashmla::%s: argument '%s': expected %s, got %s", op, argument, expected,
                actual);
  return 1;
}

template <class... Args>
const char* text(char (&buffer)[128], const char* format, Args... args) {
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

inline int out_of_memory(char* message, const char* op) {
  std::snprintf(message, FLASHMLA_MESSAGE, "flashmla::%s: out of memory", op);
  return 1;
}

// A length that the block table has no room for, and a page that the cache does not have.
inline int fail_length(char* message, const char* op, int64_t capacity, int64_t length, int64_t sequence) {
  char expected[128], actual[128];
  return fail(message, op, "cache_seqlens", text(expected, "lengths in [0, %lld]", (long long)capacity),
              text(actual, "%lld at [%lld]", (long long)length, (long long)sequence));
}
inline int fail_page(char* message, const char* op, int64_t n_pages, int64_t page, int64_t sequence, int64_t index) {
  char expected[128], actual[128];
  return fail(message, op, "block_table", text(expected, "pages in [0, %lld)", (long long)n_pages),
              text(actual, "%lld at [%lld, %lld]", (long long)page, (long long)sequence, (long long)index));
}

}  // namespace flashmla
