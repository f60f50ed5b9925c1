// What each op does with an output that waits: a residual is taken up, an activation runs the fused
// op, anything else computes the value first.
#include "deferred.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include <functional>
#include <unordered_map>

#include "../tensor/checks.h"
#include "../tensor/python_args.h"

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

bool sees_ops() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing();
}

bool has_saving_hooks() { return !at::SavedTensorDefaultHooks::get_tls_state().stack.empty(); }

// Whether what is done with the tensor now means the same as in its call.
bool may_go_on(const DeferredTensor& deferred) {
  return deferred.pending() && deferred.pending()->call->modes == Modes::now() && !sees_ops() &&
         !has_saving_hooks();
}

// Whether a tensor can be added without change of shape, dtype and device.
bool fits(const at::Tensor& residual, const at::Tensor& output) {
  if (!residual.defined() || !residual.dim() || residual.scalar_type() != output.scalar_type() ||
      residual.device() != output.device() || residual.layout() != at::kStrided ||
      residual.dim() > output.dim() || is_wrapper(residual))
    return false;
  const int64_t lead = output.dim() - residual.dim();
  for (int64_t d = 0; d < residual.dim(); ++d)
    if (residual.size(d) != output.size(lead + d) && residual.size(d) != 1) return false;
  return true;
}

bool is_one(const c10::IValue& alpha) { return alpha.toScalar().equal(1); }

void replace_arguments(Stack* stack, size_t count, const at::Tensor& result) {
  stack->erase(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  stack->emplace_back(result);
}

// self + other, where one of them waits and takes the other up. False if it cannot.
bool add(Stack* stack, bool in_place, const char* name) {
  const Arguments arguments = torch::jit::last(stack, 3);
  const at::Tensor self = arguments[0].toTensor(), other = arguments[1].toTensor();
  if (!is_one(arguments[2])) return false;
  DeferredTensor* deferred = DeferredTensor::of(self);
  DeferredTensor* const addend = DeferredTensor::of(other);
  if (deferred && addend) addend->materialize(name);  // both may be one tensor
  const bool is_first = DeferredTensor::of(self);
  if (!is_first) deferred = in_place ? nullptr : DeferredTensor::of(other);
  if (!deferred) return false;
  const at::Tensor& output = is_first ? self : other;
  const at::Tensor& residual = is_first ? other : self;
  if (!fits(residual, output)) return false;
  const auto held = deferred->lock();
  if (!may_go_on(*deferred) || deferred->pending()->residual || deferred->is_observed())
    return false;
  const std::shared_ptr<DeferredCall> call = deferred->pending()->call;
  if (in_place) deferred->wait_for(std::make_shared<Pending>(call, Watched("residual", residual)));
  replace_arguments(stack, 3,
                    in_place ? self : make_deferred(call, Watched("residual", residual), output));
  return true;
}

bool activate(Stack* stack, const ActivationOp& op, size_t count) {
  const Arguments arguments = torch::jit::last(stack, count);
  const at::Tensor self = arguments[0].toTensor();
  DeferredTensor* const deferred = DeferredTensor::of(self);
  if (!deferred) return false;
  const auto held = deferred->lock();
  if (!may_go_on(*deferred) || deferred->is_observed()) return false;
  double slope = 0.01;
  Activation activation = op.activation;
  if (op.read) activation = op.read(arguments, slope);
  if (activation == Activation::None) return false;
  const std::shared_ptr<Pending> pending = deferred->pending();
  at::Tensor result = deferred->compute(activation, slope);
  *pending->call->site = {true, pending->residual.has_value(), activation, {}};
  if (op.in_place) {
    deferred->become(result);
    result = self;
  }
  replace_arguments(stack, count, result);
  return true;
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
                             : add(stack, known->second.kind == Known::kAddInPlace, name);
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

// Whether the key is this module's. It is not if another library, or another copy of this module,
// has it; then nothing waits.
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

// A batch norm of a model: what its module asks.
class BatchNormSite {
 public:
  // An output that waits, or None where the call has to be computed at once.
  MaybeTensor defer(BatchNormCallArg given) {
    if (!owns_key() || sees_ops() || has_saving_hooks() ||
        torch::autograd::get_current_graph_task_id() != -1)
      return std::nullopt;
    count();
    BatchNormForwardCall call = read_forward(given.object);
    check_forward(call);
    if (!call.input.numel()) return std::nullopt;
    auto deferred = std::make_shared<DeferredCall>(py::reinterpret_borrow<py::tuple>(given.object),
                                                   call, record_);
    last_ = deferred;
    return make_deferred(std::move(deferred), std::nullopt, call.input);
  }

  // Updates the running statistics, if an output of the last call still waits.
  void count() {
    if (const auto call = last_.lock()) call->count();
    last_.reset();
  }

  // Computes the outputs of the last call that wait.
  void finish(const std::string& reason) {
    if (const auto call = last_.lock())
      materialize_waiting_for(call->inputs()[0].tensor, reason.c_str());
    count();
  }

  void computed_at_once(const std::string& reason) {
    *record_ = {true, false, Activation::None, reason};
  }

  // (activation, whether a residual was added, why no activation); None before the first call.
  py::object last() const {
    if (!record_->has_run) return py::none();
    return py::make_tuple(static_cast<int>(record_->activation), record_->has_residual,
                          record_->reason);
  }

 private:
  std::shared_ptr<SiteRecord> record_ = std::make_shared<SiteRecord>();
  std::weak_ptr<DeferredCall> last_;
};

}  // namespace

void bind_deferred(py::module_& m) {
  owns_key();
  py::class_<BatchNormSite>(m, "BatchNormSite")
      .def(py::init<>())
      .def("defer", &BatchNormSite::defer, py::arg("call"))
      .def("count", &BatchNormSite::count)
      .def("finish", &BatchNormSite::finish, py::arg("reason"))
      .def("computed_at_once", &BatchNormSite::computed_at_once, py::arg("reason"))
      .def_property_readonly("last", &BatchNormSite::last);
  m.def("count_waiting", &count_waiting);
  m.def("run_deferred_with", &run_deferred_with, py::arg("function"));
}

}  // namespace gradfuse
