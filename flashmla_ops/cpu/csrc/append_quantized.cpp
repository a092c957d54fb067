// Rows are quantised on their way into a cache, in one pass. Every slot is checked before the first byte is written.
#include "flashmla/append_quantized.h"
#include "flashmla/slots.h"

#define FLASHMLA_ISA plain
#include "flashmla/formats.h"
#include "flashmla/write_row.h"

namespace {

using namespace flashmla;
using namespace flashmla::plain;

struct Context {
  const FlashmlaAppend& tensor;
  int32_t row_format;
  FlashmlaDType dtype;
  const int64_t* slots;
  int64_t slot_stride, n, shares;
};

// The rows whose slots are of one share: a slot's rows are written in order, and the later of two stays.
template <class Format, class T>
void write_share(const Context& c, int64_t share) {
  const FlashmlaAppend& t = c.tensor;
  for (int64_t i = 0; i < c.n; i++) {
    const int64_t slot = c.slots[i * c.slot_stride];
    if (slot < 0 || slot % c.shares != share) continue;
    const int64_t page = slot / t.page_size;
    uint8_t* const to = reinterpret_cast<uint8_t*>(t.cache + page * t.page_bytes);
    const char* from = t.rows + i * t.row_bytes;
    for (int64_t head = 0; head < t.h_kv; head++) {
      write_row<Format>(reinterpret_cast<const T*>(from + head * t.row_head_bytes),
                        t.element_bytes / int64_t{sizeof(T)}, to + head * t.head_bytes, slot - page * t.page_size,
                        t.page_size, t.token_bytes);
    }
  }
}

void write_share(const Context& c, int64_t share) {
  with_element(c.dtype, [&](auto element) {
    switch (c.row_format) {
#define FLASHMLA_CASE(number, Format) \
  case number:                        \
    return write_share<Format, decltype(element)>(c, share);
      FLASHMLA_QUANTIZED_FORMATS(FLASHMLA_CASE)
#undef FLASHMLA_CASE
    }
  });
}

}  // namespace

extern "C" int flashmla_append_quantized(const FlashmlaAppend* tensor, int32_t row_format, FlashmlaDType dtype,
                                         const int64_t* slots, int64_t slot_stride, int64_t n,
                                         const FlashmlaRuntime* runtime, char* message) {
  if (check_slots(*tensor, slots, slot_stride, n, message)) return 1;
  const bool alone = n * tensor->h_kv < kSerialRows || runtime->num_threads <= 1;
  Context context{*tensor, row_format, dtype, slots, slot_stride, n, alone ? 1 : runtime->num_threads};
  const FlashmlaBody body = [](int64_t begin, int64_t end, void* opaque) {
    const Context& c = *static_cast<Context*>(opaque);
    for (int64_t share = begin; share < end; share++) write_share(c, share);
  };
  alone ? body(0, 1, &context) : runtime->parallel(context.shares, body, &context);
  return 0;
}
