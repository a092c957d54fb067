// Writing rows into a paged cache. Every slot is checked before the first byte is written.
#include <algorithm>
#include <cstring>

#include "flashmla/slots.h"

namespace {

using namespace flashmla;

struct Context {
  const FlashmlaAppend* tensors;
  int64_t n_tensors;
  const int64_t* slots;
  int64_t slot_stride, n;
};

// Elements [begin, end) of every row of one KV head. Work is divided by columns, not by rows: rows are then written in
// order whatever the number of threads, and where two name one slot the later one stays.
void write_columns(const FlashmlaAppend& t, const Context& c, int64_t head, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < c.n; i++) {
    const int64_t slot = c.slots[i * c.slot_stride];
    if (slot < 0) continue;
    char* to = row_at(t, slot) + head * t.head_bytes;
    const char* from = t.rows + i * t.row_bytes + head * t.row_head_bytes;
    if (t.element_bytes == t.element_size) {
      std::memcpy(to + begin * t.element_size, from + begin * t.element_size, size_t((end - begin) * t.element_size));
    } else {
      for (int64_t e = begin; e < end; e++)
        std::memcpy(to + e * t.element_size, from + e * t.element_bytes, size_t(t.element_size));
    }
  }
}

constexpr int64_t kColumns = 256;  // elements of a column block

}  // namespace

extern "C" int flashmla_append(const FlashmlaAppend* tensors, int64_t n_tensors, const int64_t* slots,
                               int64_t slot_stride, int64_t n, const FlashmlaRuntime* runtime, char* message) {
  if (check_slots(tensors[0], slots, slot_stride, n, message)) return 1;
  Context context{tensors, n_tensors, slots, slot_stride, n};
  int64_t blocks = 0, bytes = 0;
  for (int64_t t = 0; t < n_tensors; t++) {
    blocks += tensors[t].h_kv * ((tensors[t].d + kColumns - 1) / kColumns);
    bytes += n * tensors[t].h_kv * tensors[t].d * tensors[t].element_size;
  }
  const FlashmlaBody body = [](int64_t begin, int64_t end, void* opaque) {
    const Context& c = *static_cast<Context*>(opaque);
    int64_t block = 0;
    for (int64_t t = 0; t < c.n_tensors; t++) {
      const int64_t d = c.tensors[t].d;
      for (int64_t head = 0; head < c.tensors[t].h_kv; head++) {
        for (int64_t column = 0; column < d; column += kColumns, block++) {
          if (block >= begin && block < end) {
            write_columns(c.tensors[t], c, head, column, std::min(column + kColumns, d));
          }
        }
      }
    }
  };
  if (bytes < 1 << 18 || runtime->num_threads <= 1) {
    body(0, blocks, &context);  // less than what waking a thread costs
  } else {
    runtime->parallel(blocks, body, &context);
  }
  return 0;
}
