#pragma once

#include <vector>

#include "flashmla/torch_checks.h"

namespace flashmla {

// cu_seqlens as the C interface takes them: int64 ones are converted.
struct Boundaries {
  std::vector<int32_t> converted;
  const int32_t* data;
  int64_t stride;

  Boundaries(const Check& check, const char* name, const Tensor& tensor) {
    if (tensor.scalar_type() == ScalarType::Int) {
      data = tensor.const_data_ptr<int32_t>(), stride = tensor.stride(0);
      return;
    }
    const int64_t* given = tensor.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tensor.size(0); i++) {
      const int64_t value = given[i * tensor.stride(0)];
      if (value != int32_t(value)) check.fail(name, "values that int32 holds", text(value, " at [", i, "]"));
      converted.push_back(int32_t(value));
    }
    data = converted.data(), stride = 1;
  }
};

}  // namespace flashmla
