// Counts the allocations of at least `smallest` bytes that a process makes between `start` and `stop`, in every thread.
// To be loaded before all else (LD_PRELOAD), so that these functions are found in place of glibc's.

#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static atomic_size_t smallest = (size_t)-1;
static atomic_long counted;

static void note(size_t size) {
  if (size >= atomic_load(&smallest)) atomic_fetch_add(&counted, 1);
}

void allocations_start(size_t bytes) {
  atomic_store(&counted, 0);
  atomic_store(&smallest, bytes);
}

long allocations_stop(void) {
  atomic_store(&smallest, (size_t)-1);
  return atomic_load(&counted);
}

void *malloc(size_t size) {
  note(size);
  return __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
  note(count * size);
  return __libc_calloc(count, size);
}

void *realloc(void *old, size_t size) {
  note(size);
  return __libc_realloc(old, size);
}

void *memalign(size_t alignment, size_t size) {
  note(size);
  return __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size) {
  note(size);
  return __libc_memalign(alignment, size);
}

int posix_memalign(void **result, size_t alignment, size_t size) {
  note(size);
  *result = __libc_memalign(alignment, size);
  return *result ? 0 : ENOMEM;
}

void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
  note(size);
  return (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
}
