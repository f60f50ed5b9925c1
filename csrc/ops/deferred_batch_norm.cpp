#include "deferred_batch_norm.h"

#include <ATen/core/grad_mode.h>

#include "../tensor/checks.h"

namespace gradfuse {

namespace py = pybind11;
using torch::jit::Stack;
using Arguments = c10::ArrayRef<c10::IValue>;

namespace {

constexpr const char* kBatchNorm = "batch_norm_act";

// The Python function that runs a BatchNormCall with its gradient.
py::object& batch_norm_runner() {
  static py::object* const function = new py::object;  // lives on when Python ends
  return *function;
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

DeferredTensor* waiting_batch_norm(const at::Tensor& t) {
  DeferredTensor* const deferred = DeferredTensor::of(t);
  if (!deferred) return nullptr;
  const auto held = deferred->lock();
  return deferred->pending_as<PendingBatchNorm>() ? deferred : nullptr;
}

}  // namespace

DeferredCall::DeferredCall(py::tuple arguments, const BatchNormForwardCall& call,
                           std::shared_ptr<SiteRecord> site)
    : modes(Modes::now()),
      site(std::move(site)),
      arguments_(std::move(arguments)),
      has_to_count_(call.training && call.running_mean),
      stream_(call.input.device()) {
  inputs_.reserve(3);
  inputs_.emplace_back("input", call.input);
  if (call.weight) inputs_.emplace_back("weight", *call.weight);
  if (call.bias) inputs_.emplace_back("bias", *call.bias);
}

DeferredCall::~DeferredCall() {
  if (!Py_IsInitialized()) {
    arguments_.release();
    return;
  }
  const py::gil_scoped_acquire gil;
  const py::error_scope error;
  try {
    count();
  } catch (const std::exception& error) {
    TORCH_WARN(kBatchNorm,
               ": an output that nobody used left the running statistics alone: ", error.what());
  }
  py::tuple(std::move(arguments_));
}

at::Tensor DeferredCall::compute(const std::optional<Watched>& residual, Activation activation,
                                 double negative_slope) {
  const auto prepare = [&](const Watched& input) {
    input.check(kBatchNorm);
    stream_.keep(input.tensor);
  };
  for (const Watched& input : inputs_) prepare(input);
  if (residual) prepare(*residual);
  const py::gil_scoped_acquire gil;
  const ModesGuard guard(modes);
  at::Tensor output;
  with_torch_errors([&] {
    py::list arguments(arguments_);
    if (residual) {
      const at::Tensor& r = residual->tensor;
      const at::IntArrayRef sizes = inputs_[0].tensor.sizes();
      arguments[1] = py::cast(r.sizes() == sizes ? r : r.expand(sizes));
    }
    if (!has_to_count_ && arguments_[6].cast<bool>()) {
      for (const int updated : {4, 5, 16}) arguments[updated] = py::none();
    }
    arguments[9] = py::int_(static_cast<int>(activation));
    arguments[10] = py::float_(negative_slope);
    const py::object result = batch_norm_runner()(*py::tuple(std::move(arguments)));
    has_to_count_ = false;
    output = result.cast<at::Tensor>();
  });
  return output;
}

void DeferredCall::count() {
  if (!has_to_count_) return;
  const at::NoGradGuard no_grad;
  compute(std::nullopt, Activation::None, 0.0);
}

void PendingBatchNorm::for_each_input(c10::function_ref<void(const Watched&)> f) const {
  // In the order of a BatchNormCall: input, residual, weight, bias.
  const std::vector<Watched>& inputs = call->inputs();
  f(inputs[0]);
  if (residual) f(*residual);
  for (size_t i = 1; i < inputs.size(); ++i) f(inputs[i]);
}

void PendingBatchNorm::finish(const char* reason) {
  *call->site = {true, residual.has_value(), false, Activation::None, reason};
  call = nullptr;
  residual = std::nullopt;
}

bool add_to_batch_norm(Stack* stack, bool in_place, const char* name) {
  const Arguments arguments = torch::jit::last(stack, 3);
  const at::Tensor self = arguments[0].toTensor(), other = arguments[1].toTensor();
  if (!is_one(arguments[2])) return false;
  DeferredTensor* deferred = waiting_batch_norm(self);
  DeferredTensor* const addend = waiting_batch_norm(other);
  if (deferred && addend) addend->materialize(name);  // both may be one tensor
  const bool is_first = waiting_batch_norm(self);
  if (!is_first) deferred = in_place ? nullptr : waiting_batch_norm(other);
  if (!deferred) return false;
  const at::Tensor& output = is_first ? self : other;
  const at::Tensor& residual = is_first ? other : self;
  if (DeferredTensor* const waiting = DeferredTensor::of(residual)) waiting->materialize(name);
  if (!fits(residual, output)) return false;
  const auto held = deferred->lock();
  const auto pending = deferred->pending_as<PendingBatchNorm>();
  if (!pending || !deferred->may_go_on() || pending->residual) return false;
  auto sum = std::make_shared<PendingBatchNorm>(pending->call, Watched("residual", residual));
  if (in_place) deferred->wait_for(sum);
  replace_arguments(stack, 3,
                    in_place ? self : make_deferred(std::move(sum), output, output.strides()));
  return true;
}

bool activate_batch_norm(Stack* stack, Activation activation, double negative_slope, bool in_place,
                         size_t count) {
  const at::Tensor self = torch::jit::last(stack, count)[0].toTensor();
  DeferredTensor* const deferred = DeferredTensor::of(self);
  if (!deferred) return false;
  const auto held = deferred->lock();
  const auto pending = deferred->pending_as<PendingBatchNorm>();
  if (!pending || !deferred->may_go_on()) return false;
  at::Tensor result;
  deferred->without_key(
      [&] { result = pending->call->compute(pending->residual, activation, negative_slope); });
  *pending->call->site = {true, pending->residual.has_value(), false, activation, {}};
  if (in_place) {
    deferred->become(result);
    result = self;
  }
  replace_arguments(stack, count, result);
  return true;
}

namespace {

// A batch norm of a model: what its module asks.
class BatchNormSite {
 public:
  // An output that waits, or None where the call has to be computed at once.
  MaybeTensor defer(BatchNormCallArg given) {
    if (!may_wait()) return std::nullopt;
    count();
    BatchNormForwardCall call = read_forward(given.object);
    check_forward(call);
    if (!call.input.numel()) return std::nullopt;
    auto deferred = std::make_shared<DeferredCall>(py::reinterpret_borrow<py::tuple>(given.object),
                                                   call, record_);
    last_ = deferred;
    return make_deferred(std::make_shared<PendingBatchNorm>(std::move(deferred), std::nullopt),
                         call.input, output_strides(call.input));
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
    *record_ = {true, false, false, Activation::None, reason};
  }

  // (activation, whether a residual was added, why no activation); None before the first call.
  py::object last() const {
    if (!record_->has_run) return py::none();
    return py::make_tuple(static_cast<int>(record_->activation), record_->was_added,
                          record_->reason);
  }

 private:
  std::shared_ptr<SiteRecord> record_ = std::make_shared<SiteRecord>();
  std::weak_ptr<DeferredCall> last_;
};

void run_deferred_with(FunctionArg function) {
  batch_norm_runner() = py::reinterpret_borrow<py::object>(function.object);
}

}  // namespace

void bind_deferred_batch_norm(py::module_& m) {
  py::class_<BatchNormSite>(m, "BatchNormSite")
      .def(py::init<>())
      .def("defer", &BatchNormSite::defer, py::arg("call"))
      .def("count", &BatchNormSite::count)
      .def("finish", &BatchNormSite::finish, py::arg("reason"))
      .def("computed_at_once", &BatchNormSite::computed_at_once, py::arg("reason"))
      .def_property_readonly("last", &BatchNormSite::last);
  m.def("run_deferred_with", &run_deferred_with, py::arg("function"));
}

}  // namespace gradfuse
