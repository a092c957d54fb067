// Kept apart from the binding: it is the only file that includes a header of c10, which is not part of the stable ABI.
// It asks no more of c10 than one exported function, which torch 2.11 to 2.15 all have; the cache is keyed on the
// version.
#include "flashmla/requires_grad.h"

#include <c10/core/TensorImpl.h>

bool flashmla_requires_grad(const AtenTensorOpaque* tensor) {
  // A handle points to an at::Tensor, whose only member is this pointer.
  return (*reinterpret_cast<const c10::intrusive_ptr<c10::TensorImpl>*>(tensor))->requires_grad();
}
