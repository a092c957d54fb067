#pragma once

#include <cstddef>
#include <cstdlib>

namespace flashmla {

// Memory that a thread keeps from call to call, so that a call in steady state allocates nothing.
class Arena {
public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(memory_); }

  // Null if there is no memory.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
      size_ = memory_ != nullptr ? bytes : 0;
    }
    return memory_;
  }

private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace flashmla
