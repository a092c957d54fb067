// Where sequences that lie one after another begin and end: cu_seqlens [b + 1].
#pragma once

#include "flashmla/failure.h"

namespace flashmla {

struct Bounds {
  const int32_t* data;
  int64_t stride;

  int64_t operator[](int64_t i) const { return data[i * stride]; }

  // Returns 1, with a message, unless they rise from 0 to `tokens`.
  int check(const char* op, const char* name, int64_t b, int64_t tokens, char* message) const {
    const auto wrong = [&](const char* least, int64_t wanted, int64_t i, const char* why) {
      char expected[128], actual[128];
      text(expected, "%s%lld at [%lld]%s", least, (long long)wanted, (long long)i, why);
      return fail(message, op, name, expected, text(actual, "%lld", (long long)(*this)[i]));
    };
    if ((*this)[0] != 0) return wrong("", 0, 0, "");
    for (int64_t i = 1; i <= b; i++) {
      if ((*this)[i] < (*this)[i - 1]) return wrong("at least ", (*this)[i - 1], i, "");
    }
    return (*this)[b] == tokens ? 0 : wrong("", tokens, b, ", the number of tokens");
  }
};

}  // namespace flashmla
