// Memory of CUDA devices for torch.cuda.MemPool: what torch asks a pluggable allocator for comes from chunks of our
// own.
//
// A block that is freed may still be read by what its stream has been given. An event is recorded behind that, and the
// block is used again when the event has come: events are asked, never waited for.
//
// No CUDA header is needed: declarations are our own, after the ABI of the CUDA runtime API reference, and the library
// is found when the process runs.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "flashmla/interface.h"
#include "pool/heap.h"

namespace flashmla::pool {
namespace {

using Stream = void*;
using Event = void*;

constexpr int kSuccess = 0, kRelaxed = 2;
constexpr unsigned kNoTiming = 2;

// The functions of libcudart that are called here.
struct Runtime {
  int (*cudaMalloc)(void**, size_t);
  int (*cudaFree)(void*);
  int (*cudaGetDevice)(int*);
  int (*cudaSetDevice)(int);
  int (*cudaGetLastError)();
  int (*cudaEventCreateWithFlags)(Event*, unsigned);
  int (*cudaEventRecord)(Event, Stream);
  int (*cudaEventQuery)(Event);
  int (*cudaEventDestroy)(Event);
  int (*cudaStreamIsCapturing)(Stream, int*);
  int (*cudaThreadExchangeStreamCaptureMode)(int*);

  // False if there is no such library, or a function is missing from it.
  bool load(const char* path) {
    void* library = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return false;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(::dlsym(library, name));
      return function != nullptr;
    };
#define FLASHMLA_FIND(name) find(name, #name)
    return FLASHMLA_FIND(cudaMalloc) && FLASHMLA_FIND(cudaFree) && FLASHMLA_FIND(cudaGetDevice) &&
           FLASHMLA_FIND(cudaSetDevice) && FLASHMLA_FIND(cudaGetLastError) && FLASHMLA_FIND(cudaEventCreateWithFlags) &&
           FLASHMLA_FIND(cudaEventRecord) && FLASHMLA_FIND(cudaEventQuery) && FLASHMLA_FIND(cudaEventDestroy) &&
           FLASHMLA_FIND(cudaStreamIsCapturing) && FLASHMLA_FIND(cudaThreadExchangeStreamCaptureMode);
#undef FLASHMLA_FIND
  }
};
Runtime cuda;

// While it lives, this thread works on a device, and may ask events and take memory though a graph is being captured.
class Guard {
public:
  explicit Guard(int device) {
    cuda.cudaThreadExchangeStreamCaptureMode(&mode_);
    cuda.cudaGetDevice(&before_);
    if (device != before_) cuda.cudaSetDevice(device);
    changed_ = device != before_;
  }
  ~Guard() {
    if (changed_) cuda.cudaSetDevice(before_);
    cuda.cudaThreadExchangeStreamCaptureMode(&mode_);
  }

private:
  int mode_ = kRelaxed, before_ = 0;
  bool changed_;
};

struct DeviceStats {
  uint64_t size, limit, in_use, peak, blocks, largest_free, pending, pending_blocks, refused;
};

class DeviceArena {
public:
  DeviceArena(int device, size_t growth, size_t limit) : device_(device), growth_(growth), limit_(limit) {}

  // False where the device has not so much memory.
  bool start(size_t bytes) {
    std::lock_guard guard(mutex_);
    return add_chunk(bytes);
  }

  // nullptr if no free block is large enough, or its last reader may still run: torch gives back what it has cached
  // then, and asks again.
  void* allocate(size_t bytes) {
    std::lock_guard guard(mutex_);
    poll_locked();
    void* found = from_chunks(bytes);
    if (found == nullptr && add_chunk(std::max(growth_, bytes))) found = from_chunks(bytes);
    refused_ += found == nullptr;
    peak_ = std::max(peak_, in_use());
    return found;
  }

  // Takes a block back when what its stream was given so far has run.
  void release(void* pointer, Stream stream) {
    std::lock_guard guard(mutex_);
    pending_.push_back({static_cast<char*>(pointer), stream, nullptr});
    poll_locked();
  }

  void poll() {
    std::lock_guard guard(mutex_);
    poll_locked();
  }

  DeviceStats stats() {
    std::lock_guard guard(mutex_);
    DeviceStats found{};
    found.limit = limit_, found.peak = peak_, found.refused = refused_;
    for (const auto& [base, heap] : chunks_) {
      found.size += heap->size(), found.in_use += heap->in_use(), found.blocks += heap->blocks();
      found.largest_free = std::max<uint64_t>(found.largest_free, heap->largest_free());
    }
    for (const Pending& block : pending_) found.pending += size_of(block.pointer);
    found.pending_blocks = pending_.size();
    found.in_use -= found.pending, found.blocks -= found.pending_blocks;
    return found;
  }

  // Gives the memory back to the device. False, and nothing is done, while blocks are in use or pending.
  bool close() {
    std::lock_guard guard(mutex_);
    poll_locked();
    for (const auto& [base, heap] : chunks_) {
      if (heap->blocks() > 0) return false;
    }
    Guard device(device_);
    for (const auto& [base, heap] : chunks_) cuda.cudaFree(base);
    for (Event event : events_) cuda.cudaEventDestroy(event);
    chunks_.clear(), events_.clear();
    return true;
  }

private:
  struct Pending {
    char* pointer;
    Stream stream;
    Event event;  // nullptr while a graph is captured on the stream: only a graph could wait for what is recorded then
  };
  using Chunks = std::map<char*, std::unique_ptr<Heap>>;

  Heap& heap_of(char* pointer) { return *std::prev(chunks_.upper_bound(pointer))->second; }
  uint64_t offset_of(char* pointer) { return pointer - std::prev(chunks_.upper_bound(pointer))->first; }
  size_t size_of(char* pointer) { return heap_of(pointer).size_at(offset_of(pointer)); }
  size_t in_use() const {
    size_t sum = 0;
    for (const auto& [base, heap] : chunks_) sum += heap->in_use();
    return sum;
  }

  void* from_chunks(size_t bytes) {
    // A large block, since torch wants addresses that are multiples of 512.
    const size_t wanted = std::max(bytes, kLargestSmall + 1);
    for (const auto& [base, heap] : chunks_) {
      if (const auto block = heap->allocate(wanted)) return base + block->offset;
    }
    return nullptr;
  }

  bool add_chunk(size_t bytes) {
    size_t size = 0;
    for (const auto& [base, heap] : chunks_) size += heap->size();
    bytes = round_up(bytes, kStep);
    if (size + bytes > limit_) bytes = (limit_ - size) / kStep * kStep;
    if (bytes == 0) return false;
    Guard device(device_);
    void* base = nullptr;
    if (cuda.cudaMalloc(&base, bytes) != kSuccess) {
      cuda.cudaGetLastError();  // it is told by a null pointer, and is no error of whoever asks next
      return false;
    }
    auto heap = std::make_unique<Heap>(bytes);
    heap->grow(bytes);
    chunks_.emplace(static_cast<char*>(base), std::move(heap));
    return true;
  }

  // Takes back the blocks whose events have come, whichever they are.
  void poll_locked() {
    if (pending_.empty()) return;
    Guard device(device_);
    for (auto block = pending_.begin(); block != pending_.end();) {
      if (block->event == nullptr) block->event = recorded(block->stream);
      if (block->event == nullptr || cuda.cudaEventQuery(block->event) != kSuccess) {
        cuda.cudaGetLastError();  // "not ready" is no error
        ++block;
        continue;
      }
      events_.push_back(block->event);
      heap_of(block->pointer).release(offset_of(block->pointer));
      block = pending_.erase(block);
    }
  }

  // An event behind what a stream has been given; nullptr if it cannot be recorded now.
  Event recorded(Stream stream) {
    int capturing = 0;
    if (cuda.cudaStreamIsCapturing(stream, &capturing) != kSuccess || capturing) return nullptr;
    Event event = nullptr;
    if (!events_.empty()) {
      event = events_.back();
      events_.pop_back();
    } else if (cuda.cudaEventCreateWithFlags(&event, kNoTiming) != kSuccess) {
      return nullptr;
    }
    if (cuda.cudaEventRecord(event, stream) == kSuccess) return event;
    events_.push_back(event);
    return nullptr;
  }

  static constexpr size_t kStep = 2 << 20;  // CUDA's own pages

  const int device_;
  const size_t growth_, limit_;
  std::mutex mutex_;
  Chunks chunks_;  // by address
  std::list<Pending> pending_;
  std::vector<Event> events_;  // that are not in use
  size_t peak_ = 0, refused_ = 0;
};

// One a device. The table is never destroyed, since torch may free a block at any time.
struct Devices {
  struct Entry {
    DeviceArena* arena;
    bool orphaned;
  };
  std::mutex mutex;
  std::map<int, Entry> arenas;

  static Devices& get() {
    static auto* devices = new Devices;
    return *devices;
  }
  DeviceArena* find(int device) {
    std::lock_guard guard(mutex);
    const auto found = arenas.find(device);
    return found == arenas.end() ? nullptr : found->second.arena;
  }
  // Whether the device has no arena now.
  bool erase_if_orphaned(int device) {
    const auto found = arenas.find(device);
    if (found == arenas.end()) return true;
    if (!found->second.orphaned || !found->second.arena->close()) return false;
    delete found->second.arena;
    arenas.erase(found);
    return true;
  }
};

}  // namespace
}  // namespace flashmla::pool

using flashmla::pool::DeviceArena;
using flashmla::pool::Devices;

extern "C" {
FLASHMLA_EXPORT bool flashmla_device_load(const char* libcudart) { return flashmla::pool::cuda.load(libcudart); }

// 0, or 1 if the device has an arena already, or 2 if it has not so much memory.
FLASHMLA_EXPORT int flashmla_device_open(int device, size_t bytes, size_t growth, size_t limit) {
  Devices& devices = Devices::get();
  std::lock_guard guard(devices.mutex);
  if (!devices.erase_if_orphaned(device)) return 1;
  auto arena = std::make_unique<DeviceArena>(device, growth, limit);
  if (!arena->start(bytes)) return 2;
  devices.arenas[device] = {arena.release(), false};
  return 0;
}
// Nobody will use the arena any more. Its memory goes back to the device, now or when another one is opened after its
// last block has come back.
FLASHMLA_EXPORT void flashmla_device_close(int device) {
  Devices& devices = Devices::get();
  std::lock_guard guard(devices.mutex);
  if (devices.arenas.count(device)) devices.arenas[device].orphaned = true;
  devices.erase_if_orphaned(device);
}

// The two functions of a torch.cuda.memory.CUDAPluggableAllocator.
FLASHMLA_EXPORT void* flashmla_device_alloc(intptr_t bytes, int device, void*) {
  DeviceArena* arena = Devices::get().find(device);
  return arena == nullptr || bytes <= 0 ? nullptr : arena->allocate(static_cast<size_t>(bytes));
}
FLASHMLA_EXPORT void flashmla_device_free(void* pointer, intptr_t, int device, void* stream) {
  if (pointer != nullptr) Devices::get().find(device)->release(pointer, stream);
}

FLASHMLA_EXPORT bool flashmla_device_stats(int device, flashmla::pool::DeviceStats* stats) {
  DeviceArena* arena = Devices::get().find(device);
  if (arena == nullptr) return false;
  arena->poll();
  *stats = arena->stats();
  return true;
}
}
