// Torch's CPU allocator with arenas in front: where a context serves a thread, what torch allocates comes from the
// context's arena, and everywhere else from the allocator that was there before.
//
// One deleter serves both, so that the contract of `raw_deleter` holds: it tells an arena's blocks by their address.
// oneDNN's tensors, for example, are freed through it, wherever they came from.
//
// It knows more of torch than the stable ABI, and is a library of its own that fits one version.
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <new>

#include "flashmla/interface.h"
#include "pool/arena.h"
#include "pool/contexts.h"

namespace flashmla::pool {
namespace {

// So many bytes from the start of the block that this thread got last may differ from zero.
thread_local size_t dirty_bytes = SIZE_MAX;

class Hook final : public c10::Allocator {
public:
  // Takes the place of torch's allocator, once and for ever. False if one of a higher priority keeps it.
  static bool install() {
    static const bool done = [] {
      installed_ = new Hook(c10::GetCPUAllocator());
      c10::SetCPUAllocator(installed_, kPriority);
      return c10::GetCPUAllocator() == installed_;
    }();
    return done;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (process_.open.load(std::memory_order_relaxed) > 0 && bytes > 0) {
      if (void* block = from_arena(bytes)) return {block, block, &release, c10::Device(c10::kCPU)};
    }
    c10::DataPtr plain = previous_->allocate(bytes);
    if (raw_deleter() != nullptr) (void)plain.compare_exchange_deleter(previous_deleter_, &release);
    return plain;
  }

  // None where the allocator before has none: a pointer alone does not say how to free what came from there.
  c10::DeleterFnPtr raw_deleter() const override { return previous_deleter_ != nullptr ? &release : nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

private:
  static constexpr uint8_t kPriority = 100;

  explicit Hook(c10::Allocator* previous)
      : process_(Process::get()), previous_(previous), previous_deleter_(previous->raw_deleter()) {}

  static void release(void* pointer) {
    if (Arena* arena = ArenaMap::find(pointer)) {
      c10::profiledCPUMemoryReporter().Delete(pointer);
      arena->release(pointer);
    } else {
      installed_->previous_deleter_(pointer);
    }
  }

  // nullptr where no context serves this thread, or its arena is full.
  static void* from_arena(size_t bytes) {
    ContextPtr keep;
    Context* context = current(&keep);
    if (context == nullptr) return nullptr;
    if (bytes >= kParallel && own != nullptr && own->context) lead_workers();
    dirty_bytes = bytes;
    void* block = context->arena->allocate(bytes, &dirty_bytes);
    if (block != nullptr) {
      c10::profiledCPUMemoryReporter().New(block, bytes);
      return block;
    }
    if (context->strict) {
      const Stats stats = context->arena->stats();
      TORCH_CHECK_WITH(OutOfMemoryError, false, "flashmla::arena: expected a free block of ", bytes,
                       " bytes, got one of ", stats.largest_free, " (size ", stats.size, ", in use ", stats.in_use,
                       ", deferred ", stats.deferred, ")");
    }
    context->arena->fell_through(bytes);
    return nullptr;
  }

  inline static Hook* installed_ = nullptr;
  Process& process_;
  c10::Allocator* const previous_;
  const c10::DeleterFnPtr previous_deleter_;
};

}  // namespace
}  // namespace flashmla::pool

using flashmla::pool::Arena;
using flashmla::pool::ArenaMap;
using flashmla::pool::ContextPtr;

// The functions that Python calls. Nothing is thrown: nullptr, 0 or false says that there is no memory or no such
// thing.
extern "C" {
FLASHMLA_EXPORT bool flashmla_hook_install() { return flashmla::pool::Hook::install(); }

FLASHMLA_EXPORT void* flashmla_arena_new(const flashmla::pool::Options* options) {
  try {
    return Arena::create(*options);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
FLASHMLA_EXPORT void flashmla_arena_drop(void* arena) { static_cast<Arena*>(arena)->let_go(); }

FLASHMLA_EXPORT void* flashmla_arena_enter(void* arena, bool strict, bool all_threads) {
  return new ContextPtr(flashmla::pool::enter(static_cast<Arena*>(arena), strict, all_threads));
}
FLASHMLA_EXPORT void flashmla_arena_leave(void* context) {
  const std::unique_ptr<ContextPtr> given(static_cast<ContextPtr*>(context));
  flashmla::pool::leave(*given);
}

FLASHMLA_EXPORT uint64_t flashmla_arena_open_epoch(void* arena) { return static_cast<Arena*>(arena)->open_epoch(); }
FLASHMLA_EXPORT bool flashmla_arena_close_epoch(void* arena, uint64_t epoch) {
  return static_cast<Arena*>(arena)->close_epoch(epoch);
}

FLASHMLA_EXPORT void flashmla_arena_stats(void* arena, flashmla::pool::Stats* stats) {
  *stats = static_cast<Arena*>(arena)->stats();
}
// The arena that an address belongs to.
FLASHMLA_EXPORT void* flashmla_arena_of(const void* pointer) { return ArenaMap::find(pointer); }
// How much of the block that this thread got last from an arena may differ from zero, in bytes from its start.
FLASHMLA_EXPORT size_t flashmla_arena_dirty() { return flashmla::pool::dirty_bytes; }
}
