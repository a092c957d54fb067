// Ways to ask an allocator for memory from C++, for tests: torch's raw interface, parallel regions and its own thread
// pool.
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>

#include <atomic>
#include <future>
#include <thread>

namespace {

// Waits until every thread of the region is there, so that each gets a share.
void meet(std::atomic<int>& there, int count) {
  for (there++; there < count;) std::this_thread::yield();
}

}  // namespace

extern "C" {

void* raw_allocate(size_t bytes) { return c10::GetCPUAllocator()->raw_allocate(bytes); }
void raw_deallocate(void* pointer) { c10::GetCPUAllocator()->raw_deallocate(pointer); }

// Whether what is allocated keeps the contract of the raw interface: data as context, and the one deleter.
bool keeps_contract(size_t bytes) {
  c10::Allocator& allocator = *c10::GetCPUAllocator();
  const c10::DataPtr data = allocator.allocate(bytes);
  return allocator.is_simple_data_ptr(data) && data.get_deleter() == allocator.raw_deleter();
}

// A block of each thread of a parallel region. Returns how many there are.
int allocate_in_region(size_t bytes, void** blocks) {
  const int count = at::get_num_threads();
  std::atomic<int> there{0};
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    meet(there, count);
    for (int64_t n = begin; n < end; n++) blocks[n] = raw_allocate(bytes);
  });
  return count;
}

// A block of a thread of torch's pool.
void* allocate_in_pool(size_t bytes) {
  std::promise<void*> block;
  at::launch([&] { block.set_value(raw_allocate(bytes)); });
  return block.get_future().get();
}

// A block of a thread of C++, which works for nobody.
void* allocate_in_thread(size_t bytes) {
  void* block = nullptr;
  std::thread([&] { block = raw_allocate(bytes); }).join();
  return block;
}
}
