// Writing rows into a quantised cache. Apart from interface.h, which every kernel includes and none of them needs this.
#pragma once

#include "flashmla/interface.h"

extern "C" {

// `tensor` says where bytes go; its rows have elements of `dtype`, as many as the format's rows hold.
// `row_format`: a number of flashmla/formats.h.
FLASHMLA_EXPORT int flashmla_append_quantized(const FlashmlaAppend* tensor, int32_t row_format, FlashmlaDType dtype,
                                              const int64_t* slots, int64_t slot_stride, int64_t n,
                                              const FlashmlaRuntime* runtime, char* message);
}
