// The operators' kernels at torch's Autograd and ADInplaceOrView keys, for all operators alike: the first hands a call
// that is differentiated to the kernel in Python, or refuses a gradient, and the second tells autograd of what was
// mutated. flashmla_ops/ops/_autograd.py says why, and holds the same in Python for where this is not compiled.
//
// It knows more of torch than the stable ABI, and is a library of its own that fits one version.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/AutogradState.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

namespace {

using torch::jit::Stack;

constexpr const char* kNamespace = "flashmla";

// Whether a derivative with respect to `tensor` could be asked for: a gradient, or the tangent of a dual number.
struct Differentiated {
  bool backward = c10::AutogradState::get_tls_state().get_grad_mode();
  bool forward = c10::AutogradState::get_tls_state().get_fw_grad_mode();

  bool operator()(const at::Tensor& tensor) const {
    if (!tensor.defined()) return false;
    return (backward && tensor.requires_grad()) || (forward && tensor._fw_grad(/*level=*/0).defined());
  }
  // The name of the argument, or of its element, of which it is true.
  std::optional<std::string> find(const std::string& name, const c10::IValue& value) const {
    if (value.isTensor()) {
      if ((*this)(value.toTensor())) return name;
    } else if (value.isTensorList()) {
      const auto tensors = value.toTensorList();
      for (size_t i = 0; i < tensors.size(); i++) {
        if ((*this)(tensors.get(i))) return name + "[" + std::to_string(i) + "]";
      }
    }
    return std::nullopt;
  }
};

// Raises the error of flashmla_ops/errors.py. An exception of Python's passes through torch's dispatcher as it is.
[[noreturn]] void refuse(const c10::OperatorHandle& op, const std::string& argument) {
  static const auto raise = c10::Dispatcher::singleton().findSchemaOrThrow("flashmla::_refuse_gradient", "");
  const std::string name = op.operator_name().name;
  Stack stack{name.substr(name.find("::") + 2), argument};
  raise.redispatchBoxed(c10::DispatchKeySet(), &stack);  // past every mode and transform: it has no tensors
  TORCH_INTERNAL_ASSERT(false);
}

// The operator that differentiates `op`, where it has a backward: _autograd.py's `twin`.
std::optional<c10::OperatorHandle> twin(const c10::OperatorHandle& op) {
  const c10::OperatorName& name = op.operator_name();
  const std::string own = name.name.substr(name.name.find("::") + 2);
  return c10::Dispatcher::singleton().findSchema(
      {std::string(kNamespace) + "::_differentiated_" + own, name.overload_name});
}

void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const Differentiated differentiated;
  if (differentiated.backward || differentiated.forward) {
    const auto& arguments = op.schema().arguments();
    const auto values = torch::jit::last(*stack, arguments.size());
    for (size_t i = 0; i < arguments.size(); i++) {
      const auto found = differentiated.find(arguments[i].name(), values[i]);
      if (!found) continue;
      if (const auto differentiates = twin(op)) {
        return differentiates->redispatchBoxed(keys & (c10::autograd_dispatch_keyset | c10::after_autograd_keyset),
                                               stack);
      }
      refuse(op, *found);
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

void mutation(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> mutated;
  for (size_t i = 0; i < arguments.size(); i++) {
    if (const auto* alias = arguments[i].alias_info(); alias != nullptr && alias->isWrite()) {
      mutated.push_back(values[i].toTensor());
    }
  }
  // Outside inference mode an inference tensor has no version and refuses, and nothing must have been written then.
  for (const at::Tensor& tensor : mutated) {
    if (tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  for (const at::Tensor& tensor : mutated) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// One library a key, with a kernel for each operator of ours: they are defined before this is loaded.
torch::Library implementations(c10::DispatchKey key) {
  torch::Library library(torch::Library::IMPL, kNamespace, key, __FILE__, __LINE__);
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.getNamespace() != kNamespace || name.name.find("::_") != std::string::npos) continue;
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str());
    if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) continue;  // it calls others
    if (key == c10::DispatchKey::Autograd) {
      library.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&autograd>());
    } else if (op.schema().is_mutable()) {
      library.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&mutation>());
    }
  }
  return library;
}

const torch::Library kAutograd = implementations(c10::DispatchKey::Autograd);
const torch::Library kMutation = implementations(c10::DispatchKey::ADInplaceOrView);

}  // namespace
