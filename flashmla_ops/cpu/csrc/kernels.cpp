// The library of one instruction set: this file and those named kernels_*.cpp, compiled with -DFLASHMLA_ISA=<name> and
// that set's compiler flags. The core's library is given its table (dispatch.cpp). What the others instantiate stays in
// this library, so no other code ever runs an instruction that the processor lacks.
#include "flashmla/kernels.h"

#include "flashmla/interface.h"

#define FLASHMLA_STRING_(a) #a
#define FLASHMLA_STRING(a) FLASHMLA_STRING_(a)

namespace flashmla::FLASHMLA_ISA {

extern const AttentionKernels attention_kernels;
extern const BackwardKernels backward_kernels;
extern const ProductKernels product_kernels;
extern const SelectionKernels selection_kernels;

}  // namespace flashmla::FLASHMLA_ISA

extern "C" const void* flashmla_kernels(void) {
  using namespace flashmla::FLASHMLA_ISA;
  static const flashmla::Kernels kernels = {attention_kernels, backward_kernels, product_kernels, selection_kernels,
                                            FLASHMLA_STRING(FLASHMLA_ISA)};
  return &kernels;
}
