// Work that threads share: each takes the next piece when it is done with the one before.
#pragma once

#include <algorithm>
#include <atomic>

#include "flashmla/interface.h"

namespace flashmla {

// Calls body(i) for all i < n, which returns false to have no thread take another. Returns whether none did.
template <class Body>
bool in_turns(const FlashmlaRuntime& runtime, int64_t n, Body body) {
  struct Turns {
    Body& body;
    const int64_t n;
    std::atomic<int64_t> next{0};
    std::atomic<bool> stopped{false};

    void take() {
      for (int64_t i = next++; i < n && !stopped; i = next++) {
        if (!body(i)) stopped = true;
      }
    }
  } turns{body, n};
  const int64_t threads = std::min(runtime.num_threads, n);
  if (threads <= 1) {
    turns.take();
  } else {
    runtime.parallel(
        threads,
        [](int64_t begin, int64_t end, void* self) {
          for (int64_t i = begin; i < end; i++) static_cast<Turns*>(self)->take();
        },
        &turns);
  }
  return !turns.stopped;
}

}  // namespace flashmla
