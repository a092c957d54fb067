// Virtual memory: ranges that are reserved at once and take memory as they are written.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace flashmla::pool {

constexpr size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A range of addresses of this process, zero where nothing has been written. Only its first `commit`ted bytes may be
// touched. It is private: after a fork, parent and child have each their own.
class Reservation {
public:
  // Empty if the system has no such range. `alignment` is a power of two and a multiple of the system's pages.
  Reservation(size_t bytes, size_t alignment) {
    void* found = ::mmap(nullptr, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return;
    const auto first = reinterpret_cast<uintptr_t>(found), start = round_up(first, alignment);
    if (start > first) ::munmap(found, start - first);
    ::munmap(reinterpret_cast<void*>(start + bytes), first + alignment - start);
    base_ = reinterpret_cast<char*>(start), bytes_ = bytes;
  }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  ~Reservation() {
    if (base_) ::munmap(base_, bytes_);
  }

  explicit operator bool() const { return base_ != nullptr; }
  char* base() const { return base_; }
  size_t bytes() const { return bytes_; }

  // Lets [from, to) be read and written. False if the system does not grant so much memory.
  bool commit(size_t from, size_t to) { return ::mprotect(base_ + from, to - from, PROT_READ | PROT_WRITE) == 0; }

  // Asks for huge pages where the system has them.
  void prefer_huge_pages() {
#ifdef MADV_HUGEPAGE
    ::madvise(base_, bytes_, MADV_HUGEPAGE);
#endif
  }

  // Takes memory for [from, to) now, not at its first write.
  void populate(size_t from, size_t to) {
#ifdef MADV_POPULATE_WRITE
    if (::madvise(base_ + from, to - from, MADV_POPULATE_WRITE) == 0) return;
#endif
    const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    for (size_t at = from; at < to; at += page) static_cast<volatile char*>(base_)[at] = 0;
  }

private:
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace flashmla::pool
