// Dense attention over sequences that lie one after another.
#include <new>

#include "flashmla/failure.h"
#include "flashmla/prefill.h"
#include "flashmla/sequences.h"

namespace flashmla {
namespace {

const std::vector<Sequences::Sequence>& sequences_of(const FlashmlaPrefill& call) {
  std::vector<Sequences::Sequence>& sequences = Sequences::kept();
  for (int64_t i = 0; i < call.b; i++) sequences.push_back({sequence_of(call, i), 0, length_of(call, i)});
  return sequences;
}

}  // namespace
}  // namespace flashmla

extern "C" int flashmla_prefill(const FlashmlaPrefill* call, const FlashmlaRuntime* runtime, char* message) try {
  using namespace flashmla;
  if (check_bounds("prefill", *call, message)) return 1;
  if (call->h_q == 0 || Sequences(sequences_of(*call), runtime->num_threads).run(*runtime)) return 0;
  return out_of_memory(message, "prefill");
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, "prefill");
}

extern "C" void flashmla_prefill_footprint(const FlashmlaPrefill* call, int64_t num_threads,
                                           FlashmlaFootprint* footprint) {
  using namespace flashmla;
  *footprint = Sequences(sequences_of(*call), num_threads).footprint();
}
