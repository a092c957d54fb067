// Choosing pages, once for each instruction set (see kernels.cpp).
#include "flashmla/isa/compiled_for.h"
#include "flashmla/page_mass.h"

namespace flashmla {
namespace FLASHMLA_ISA {
namespace {

int64_t page_mass_bytes(const FlashmlaPageMass& call) {
  return with_element(call.keys.dtype, [&](auto t) { return PageMass<Isa, decltype(t)>::bytes(call); });
}
void page_mass(const FlashmlaPageMass& call, const PageItem& item, char* scratch) {
  with_element(call.keys.dtype, [&](auto t) { PageMass<Isa, decltype(t)>(call, item, scratch).run(); });
}
void exponentials(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + Isa::W <= n; i += Isa::W) Isa::store(x + i, exp2<Isa>(Isa::load(x + i)));
  if (i == n) return;
  float last[Isa::W] = {};
  std::memcpy(last, x + i, size_t(n - i) * sizeof(float));
  Isa::store(last, exp2<Isa>(Isa::load(static_cast<const float*>(last))));
  std::memcpy(x + i, last, size_t(n - i) * sizeof(float));
}

}  // namespace

extern const SelectionKernels selection_kernels;
const SelectionKernels selection_kernels = {
    .page_mass_bytes = page_mass_bytes, .page_mass = page_mass, .exponentials = exponentials};

}  // namespace FLASHMLA_ISA
}  // namespace flashmla
