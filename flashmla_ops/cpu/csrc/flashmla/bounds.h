// Where sequences that lie one after another begin and end: cu_seqlens [b + 1].
#pragma once

#include <cstdio>

#include "flashmla/interface.h"

namespace flashmla {

struct Bounds {
  const int32_t* data;
  int64_t stride;

  int64_t operator[](int64_t i) const { return data[i * stride]; }

  // Returns 1, with a message, unless they rise from 0 to `tokens`.
  int check(const char* op, const char* name, int64_t b, int64_t tokens, char* message) const {
    const auto fail = [&](const char* least, int64_t expected, int64_t i, const char* why) {
      std::snprintf(message, FLASHMLA_MESSAGE, "flashmla::%s: argument '%s': expected %s%lld at [%lld]%s, got %lld", op,
                    name, least, (long long)expected, (long long)i, why, (long long)(*this)[i]);
      return 1;
    };
    if ((*this)[0] != 0) return fail("", 0, 0, "");
    for (int64_t i = 1; i <= b; i++) {
      if ((*this)[i] < (*this)[i - 1]) return fail("at least ", (*this)[i - 1], i, "");
    }
    return (*this)[b] == tokens ? 0 : fail("", tokens, b, ", the number of tokens");
  }
};

}  // namespace flashmla
