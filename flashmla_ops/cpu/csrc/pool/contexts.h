// Which arena serves a thread: the one of a context that it has entered, or that it inherits from a thread it works
// for.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "pool/arena.h"

namespace flashmla::pool {

// An arena that is in use between `enter` and `leave`. Other threads may come upon it later still, closed.
struct Context {
  Context(Arena* given, bool raises) : arena(given), strict(raises) { arena->hold(); }
  ~Context() { arena->let_go(); }

  Arena* const arena;
  const bool strict;  // raise where the arena is full
  std::atomic<bool> open{true};
  std::shared_ptr<Context> outer;                  // of the same thread
  std::shared_ptr<c10::SafePyObject> inheritance;  // what the thread had from others
};
using ContextPtr = std::shared_ptr<Context>;

// The innermost that is open still, in whatever order contexts were left.
inline Context* innermost(Context* context) {
  while (context != nullptr && !context->open.load(std::memory_order_acquire)) context = context->outer.get();
  return context;
}

// The context that a thread has entered. Threads of its parallel regions, which run while it waits, look there too.
struct Entered {
  ContextPtr context;
  std::atomic<int> workers{0};
};

// Pointers that a thread can read even while its variables are being destroyed, and what keeps them valid until then.
inline thread_local Entered* own = nullptr;
inline thread_local Entered* leaders = nullptr;
struct Owner {
  std::shared_ptr<Entered> own_entered, leaders_entered;
  void follow(std::shared_ptr<Entered> leader) {
    if (leaders != nullptr) leaders->workers--;
    leaders_entered = std::move(leader);
    leaders = leaders_entered.get();
    if (leaders != nullptr) leaders->workers++;
  }
  ~Owner() {
    follow(nullptr);
    own = nullptr;
  }
};
inline thread_local Owner owner;

// Contexts of the whole process.
struct Process {
  std::atomic<int> open{0};    // contexts of any kind
  std::atomic<int> shared{0};  // those that serve all threads
  bool forked = false;         // from a process that may have had threads
  std::mutex mutex;
  std::vector<ContextPtr> serving_all;

  static Process& get() {
    static Process* process = [] {  // never destroyed: threads may outlive static variables
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); },
                     [] {
                       get().mutex.unlock();
                       get().forked = true;
                     });
      return new Process;
    }();
    return *process;
  }
};

// Torch hands the objects of this table to the threads that work for a thread: autograd's, and those of at::launch.
// Ours is no object of Python's; the table is just what they inherit.
struct Inheritance : c10::SafePyObject {
  explicit Inheritance(ContextPtr given) : SafePyObject(nullptr, nullptr), context(std::move(given)) {}
  const ContextPtr context;

  using Table = at::impl::ThreadLocalPythonObjects;
  static const std::string& key() {
    static const auto* name = new std::string("flashmla_arena");
    return *name;
  }
  static std::shared_ptr<c10::SafePyObject> get() { return Table::contains(key()) ? Table::get(key()) : nullptr; }
  static void set(std::shared_ptr<c10::SafePyObject> value) {
    if (value) {
      Table::set(key(), std::move(value));
    } else if (Table::contains(key())) {
      Table::erase(key());
    }
  }
};

// The context that serves this thread, or nullptr. `keep` keeps it alive if another thread may leave it meanwhile.
inline Context* current(ContextPtr* keep) {
  Context* found = own != nullptr ? innermost(own->context.get()) : nullptr;
  if (found == nullptr && leaders != nullptr) found = innermost(leaders->context.get());
  if (found != nullptr) return found;
  if (const auto inherited = Inheritance::get()) {
    *keep = static_cast<const Inheritance&>(*inherited).context;
    if ((found = innermost(keep->get()))) return found;
  }
  Process& process = Process::get();
  if (process.shared.load(std::memory_order_acquire) == 0) return nullptr;
  std::lock_guard guard(process.mutex);
  if (process.serving_all.empty()) return nullptr;
  *keep = process.serving_all.back();
  return keep->get();
}

// Has the threads of this thread's parallel regions look at it, if some of them do not yet. It starts them, as this
// thread's next parallel region would.
inline void lead_workers() {
  // A fork has the books of OpenMP's threads, but not the threads: a parallel region would wait for them for ever.
  if (Process::get().forked || at::in_parallel_region()) return;
  if (at::get_num_threads() - 1 <= own->workers.load()) return;
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  // Looked up in the OpenMP library that torch uses, whichever it is: its threads are meant.
  static const auto parallel = reinterpret_cast<Parallel>(::dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel == nullptr) return;
  const auto follow = [](void* leader) {
    const auto& given = *static_cast<const std::shared_ptr<Entered>*>(leader);
    if (own != given.get() && leaders != given.get()) owner.follow(given);
  };
  parallel(follow, &owner.own_entered, 0, 0);
}

// From so many bytes on, torch's loops over a tensor are parallel.
constexpr size_t kParallel = 32768;

// This thread, and those that work for it, are served by the arena until `leave`. Only the main thread surely has
// parallel regions; another one, which may be one of hundreds, starts no threads before it has something large for
// them.
inline ContextPtr enter(Arena* arena, bool strict, bool all_threads) {
  auto context = std::make_shared<Context>(arena, strict);
  if (own == nullptr) {
    owner.own_entered = std::make_shared<Entered>();
    own = owner.own_entered.get();
  }
  context->outer = own->context;
  context->inheritance = Inheritance::get();
  Inheritance::set(std::make_shared<Inheritance>(context));
  own->context = context;
  Process& process = Process::get();
  process.open++;
  if (all_threads) {
    std::lock_guard guard(process.mutex);
    process.serving_all.push_back(context);
    process.shared++;
  }
  if (::syscall(SYS_gettid) == ::getpid()) lead_workers();
  return context;
}

// On whatever thread, and in whatever order.
inline void leave(const ContextPtr& context) {
  Process& process = Process::get();
  context->open.store(false, std::memory_order_release);
  process.open--;
  {
    std::lock_guard guard(process.mutex);
    if (std::erase(process.serving_all, context) > 0) process.shared--;
  }
  while (own != nullptr && own->context && !own->context->open) {
    Inheritance::set(own->context->inheritance);
    own->context = own->context->outer;
  }
}

}  // namespace flashmla::pool
