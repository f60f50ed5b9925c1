// What each op does with an output that waits: a residual and an activation may be taken up,
// anything else computes the value first.
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include <functional>
#include <unordered_map>

#include "deferred_batch_norm.h"
#include "deferred_sum.h"

namespace gradfuse {
namespace {

using torch::jit::Stack;

// Whether an activation called with these arguments, its input first, is the fused one.
using Arguments = c10::ArrayRef<c10::IValue>;
struct ActivationOp {
  Activation activation;
  bool in_place;
  Activation (*read)(Arguments arguments, double& slope);  // Activation::None if not; or null
};

Activation read_hardtanh(Arguments a, double&) {
  const bool is_relu6 = a[1].toScalar().equal(0) && a[2].toScalar().equal(6);
  return is_relu6 ? Activation::Relu6 : Activation::None;
}

Activation read_leaky_relu(Arguments a, double& slope) {
  const c10::Scalar given = a[1].toScalar();
  if (given.isComplex()) return Activation::None;
  slope = given.toDouble();
  return Activation::LeakyRelu;
}

Activation read_gelu(Arguments a, double&) {
  return a[1].toStringRef() == "tanh" ? Activation::GeluTanh : Activation::Gelu;
}

struct Known {
  enum Kind { kActivation, kAdd, kAddInPlace } kind;
  ActivationOp op;
};

// By the address of the schema, which the dispatcher keeps.
const std::unordered_map<const c10::FunctionSchema*, Known>& known_ops() {
  static const auto* const ops = [] {
    auto* const found = new std::unordered_map<const c10::FunctionSchema*, Known>;
    const auto add = [&](const std::string& name, const char* overload, const Known& known) {
      const auto op = c10::Dispatcher::singleton().findSchema({name, overload});
      if (op) found->emplace(&op->schema(), known);
    };
    const auto add_activation = [&](const char* name, Activation activation,
                                    decltype(ActivationOp::read) read = nullptr) {
      const std::string full = std::string("aten::") + name;
      add(full, "", {Known::kActivation, {activation, false, read}});
      add(full + "_", "", {Known::kActivation, {activation, true, read}});
    };
    add_activation("relu", Activation::Relu);
    add_activation("relu6", Activation::Relu6);
    add_activation("hardtanh", Activation::Relu6, &read_hardtanh);
    add_activation("leaky_relu", Activation::LeakyRelu, &read_leaky_relu);
    add_activation("silu", Activation::Silu);
    add_activation("gelu", Activation::Gelu, &read_gelu);
    add_activation("hardswish", Activation::Hardswish);
    add_activation("sigmoid", Activation::Sigmoid);
    add_activation("tanh", Activation::Tanh);
    add("aten::add", "Tensor", {Known::kAdd, {}});
    add("aten::add_", "Tensor", {Known::kAddInPlace, {}});
    return found;
  }();
  return *ops;
}

bool sum(Stack* stack, bool in_place, const char* name) {
  return add_to_batch_norm(stack, in_place, name) || (!in_place && add_for_norm(stack, name));
}

bool activate(Stack* stack, const ActivationOp& op, size_t count) {
  double slope = 0.01;
  Activation activation = op.activation;
  if (op.read) activation = op.read(torch::jit::last(stack, count), slope);
  return activation != Activation::None &&
         activate_batch_norm(stack, activation, slope, op.in_place, count);
}

void for_each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isList())
    for (const c10::IValue& item : value.toListRef()) for_each_tensor(item, f);
  else if (value.isTuple())
    for (const c10::IValue& item : value.toTupleRef().elements()) for_each_tensor(item, f);
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const char* const name = schema.name().c_str();
  const size_t count = schema.arguments().size();
  const auto known = known_ops().find(&schema);
  if (known != known_ops().end()) {
    const bool is_done = known->second.kind == Known::kActivation
                             ? activate(stack, known->second.op, count)
                             : sum(stack, known->second.kind == Known::kAddInPlace, name);
    if (is_done) return;
  }
  const Arguments arguments = torch::jit::last(stack, count);
  for (size_t i = 0; i < count; ++i) {
    const c10::AliasInfo* const alias = schema.arguments()[i].alias_info();
    for_each_tensor(arguments[i], [&](const at::Tensor& t) {
      if (DeferredTensor* const deferred = DeferredTensor::of(t)) deferred->materialize(name);
      if (alias && alias->isWrite() && t.defined()) materialize_waiting_for(t, name);
      remove_stray_key(t);
    });
  }
  {
    const c10::impl::ExcludeDispatchKeyGuard guard(kDeferredKey);
    op.callBoxed(stack);
  }
  for (const c10::IValue& value : torch::jit::last(stack, schema.returns().size()))
    for_each_tensor(value, &remove_stray_key);
}

}  // namespace

void replace_arguments(Stack* stack, size_t count, const at::Tensor& result) {
  stack->erase(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  stack->emplace_back(result);
}

bool is_one(const c10::IValue& alpha) { return alpha.toScalar().equal(1); }

bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing() ||
         !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

bool may_wait() {
  return owns_key() && !is_watched() && torch::autograd::get_current_graph_task_id() == -1;
}

// It is not if another library, or another copy of this module, has it.
bool owns_key() {
  static const bool is_owner = [] {
    if (c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(kDeferredKey)) return false;
    auto* const library =
        new torch::Library(torch::Library::IMPL, "_", kDeferredKey, __FILE__, __LINE__);
    library->fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
    return true;
  }();
  return is_owner;
}

void bind_deferred(pybind11::module_& m) {
  owns_key();
  m.def("count_waiting", &count_waiting);
  bind_deferred_batch_norm(m);
  bind_deferred_sum(m);
}

}  // namespace gradfuse
