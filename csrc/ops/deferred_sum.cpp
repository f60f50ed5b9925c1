#include "deferred_sum.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <c10/util/strides.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include "../tensor/checks.h"
#include "../tensor/python_args.h"

namespace gradfuse {

namespace py = pybind11;
namespace autograd = torch::autograd;

namespace {

constexpr const char* kDropoutAdd = "dropout_add";

// The Python function that adds a residual, or None, to a dropout, with a gradient.
py::object& dropout_runner() {
  static py::object* const function = new py::object;  // lives on when Python ends
  return *function;
}

at::Tensor run_dropout(const at::Tensor& input, const MaybeTensor& residual,
                       const Dropped& dropout) {
  at::Tensor found;
  const py::gil_scoped_acquire gil;
  with_torch_errors([&] {
    found = dropout_runner()(input, residual, dropout.p, dropout.seed, dropout.sample_scale)
                .cast<at::Tensor>();
  });
  return found;
}

// A dropout that waits and whose residual may be added in the same op.
struct Offered {
  Watched input;  // since the dropout was called
  Dropped dropout;
};

std::optional<Offered> offered_by(const at::Tensor& t) {
  DeferredTensor* const deferred = DeferredTensor::of(t);
  if (!deferred) return std::nullopt;
  const auto held = deferred->lock();
  const auto pending = deferred->pending_as<PendingSum>();
  if (!pending || pending->residual || !deferred->is_as_called()) return std::nullopt;
  return Offered{*pending->input, pending->dropout};
}

// Whether a norm's module marked the tensor, see expect_sum.
bool is_marked(const at::Tensor& t) {
  return t.key_set().has(kDeferredKey) && !DeferredTensor::of(t) && !is_waited_for(t);
}

// Whether gradfuse's ops read the tensor's memory as it is, and see who writes to it.
bool is_dense(const at::Tensor& t) {
  return t.layout() == at::kStrided && !is_wrapper(t) && !t.is_inference();
}

// Whether the sum has the dtype and shape of either.
bool can_add(const at::Tensor& input, const at::Tensor& residual) {
  return is_dense(input) && is_dense(residual) && input.device() == residual.device() &&
         input.scalar_type() == residual.scalar_type() && input.sizes() == residual.sizes();
}

bool may_wait_for_norm() { return may_wait() && !c10::InferenceMode::is_enabled(); }

}  // namespace

void Dropped::note(bool was_added, bool was_normalised, const std::string& reason) const {
  for (const auto& site : sites)
    *site = {true, was_added, was_normalised, Activation::None, reason};
}

PendingSum::PendingSum(Watched input, std::optional<Watched> residual, Dropped dropout, Dropped own,
                       autograd::edge_list edges)
    : Pending(Modes::now()),
      input(std::move(input)),
      residual(std::move(residual)),
      dropout(std::move(dropout)),
      adds_(this->residual.has_value()),
      own_(std::move(own)),
      edges_(std::move(edges)),
      stream_(this->input->tensor.device()) {}

void PendingSum::for_each_input(c10::function_ref<void(const Watched&)> f) const {
  if (input) f(*input);
  if (residual) f(*residual);
}

autograd::variable_list PendingSum::backward(autograd::variable_list grads) {
  autograd::variable_list found(edges_.size(), grads[0]);
  if (grads[0].defined() && !own_.is_identity())
    found[0] = run_dropout(grads[0], std::nullopt, own_);
  return found;
}

void PendingSum::check() const {
  for_each_input([&](const Watched& read) {
    read.check(kDropoutAdd);
    stream_.keep(read.tensor);
  });
}

at::Tensor PendingSum::value() {
  check();
  const ModesGuard guard(modes);
  const at::NoGradGuard no_grad;  // the node is there
  if (dropout.is_identity()) return at::add(residual->tensor, input->tensor);
  return run_dropout(input->tensor, residual ? MaybeTensor(residual->tensor) : std::nullopt,
                     dropout);
}

bool add_for_norm(torch::jit::Stack* stack, const char* name) {
  const auto arguments = torch::jit::last(stack, 3);
  const at::Tensor self = arguments[0].toTensor(), other = arguments[1].toTensor();
  // With a contiguous first argument torch's sum is contiguous.
  if (!is_one(arguments[2]) || !self.defined() || !other.defined() || self.is_same(other) ||
      !self.is_contiguous() || !may_wait_for_norm())
    return false;
  at::Tensor input = other, residual = self;
  std::optional<Offered> offered = offered_by(input);
  if (!offered && (offered = offered_by(residual))) std::swap(input, residual);
  if (!offered && !is_marked(input) && !is_marked(residual)) return false;
  autograd::edge_list edges;
  if (at::GradMode::is_enabled())
    edges = {autograd::impl::gradient_edge(input), autograd::impl::gradient_edge(residual)};
  if (offered) input = offered->input.tensor;
  // What else waits is computed: a first sum, or the other one of two dropouts.
  for (const at::Tensor& t : {residual, input})
    if (DeferredTensor* const waiting = DeferredTensor::of(t)) waiting->materialize(name);
  if (!can_add(input, residual)) return false;
  auto sum = std::make_shared<PendingSum>(
      offered ? offered->input : Watched("input", input), Watched("residual", residual),
      offered ? offered->dropout : Dropped{}, Dropped{}, std::move(edges));
  replace_arguments(
      stack, 3, make_deferred(std::move(sum), residual, c10::contiguous_strides(residual.sizes())));
  return true;
}

namespace {

// A dropout module of a model, or one that drops paths: what it asks.
class DropoutSite {
 public:
  // An output that waits, or None where the call has to be computed at once.
  MaybeTensor defer(const at::Tensor& input, double p, const MaybeTensor& seed,
                    const MaybeTensor& sample_scale) {
    if (!may_wait_for_norm()) return std::nullopt;
    const Dropped own{p, seed, sample_scale, {}};
    autograd::edge_list edges;
    if (at::GradMode::is_enabled()) edges = {autograd::impl::gradient_edge(input)};
    std::optional<Offered> from = seed ? std::nullopt : offered_by(input);
    if (from && !from->dropout.sample_scale) {  // a path is dropped after a dropout
      from->dropout.sample_scale = sample_scale;
    } else {
      if (DeferredTensor* const waiting = DeferredTensor::of(input))
        waiting->materialize("a dropout");
      if (!is_dense(input) || !input.is_non_overlapping_and_dense()) return std::nullopt;
      from = Offered{Watched("input", input), own};
    }
    from->dropout.sites.push_back(record_);
    *record_ = {true, false, false, Activation::None, "nobody used its output"};
    auto pending = std::make_shared<PendingSum>(std::move(from->input), std::nullopt,
                                                std::move(from->dropout), own, std::move(edges));
    return make_deferred(std::move(pending), input, input.strides());
  }

  void computed_at_once(const std::string& reason) {
    *record_ = {true, false, false, Activation::None, reason};
  }

  // (whether a residual was added, whether that was normalised, why not); None before a call.
  py::object last() const {
    if (!record_->has_run) return py::none();
    return py::make_tuple(record_->was_added, record_->was_normalised, record_->reason);
  }

 private:
  std::shared_ptr<SiteRecord> record_ = std::make_shared<SiteRecord>();
};

// Lets the sum wait that the tensor is expected to be added to next, if it has that many bytes.
void expect_sum(const at::Tensor& t, size_t least_bytes) {
  if (t.nbytes() >= least_bytes && may_wait_for_norm() && !t.key_set().has(kDeferredKey) &&
      is_dense(t))
    add_key(t);
}

// (norm, statistics, whether a path was dropped, a dropout, a residual) of a sum or dropout that
// waits, which gets its value on the way: by function(input, residual, p, seed, sample_scale),
// whose result is (norm, sum, statistics), all without a gradient. None of any other tensor; what
// cannot be taken up is computed first.
py::object normalise_sum(const at::Tensor& t, FunctionArg given) {
  const auto function = py::reinterpret_borrow<py::function>(given.object);
  DeferredTensor* const deferred = DeferredTensor::of(t);
  if (!deferred) return py::none();
  const auto held = deferred->lock();
  const auto sum = deferred->pending_as<PendingSum>();
  if (!sum || !deferred->is_as_called() || !may_wait()) {
    deferred->materialize("a norm");
    return py::none();
  }
  sum->check();
  const Dropped& dropout = sum->dropout;
  const MaybeTensor residual = sum->residual ? MaybeTensor(sum->residual->tensor) : std::nullopt;
  py::tuple results;
  deferred->without_key([&] {
    results = function(sum->input->tensor, residual, dropout.p, dropout.seed, dropout.sample_scale);
  });
  deferred->fill(results[1].cast<at::Tensor>());
  dropout.note(residual.has_value(), true, {});
  return py::make_tuple(results[0], results[2], dropout.sample_scale.has_value(),
                        dropout.seed.has_value(), residual.has_value());
}

void run_dropout_with(FunctionArg function) {
  dropout_runner() = py::reinterpret_borrow<py::object>(function.object);
}

}  // namespace

void bind_deferred_sum(py::module_& m) {
  py::class_<DropoutSite>(m, "DropoutSite")
      .def(py::init<>())
      .def("defer", &DropoutSite::defer, py::arg("input"), py::arg("p"), py::arg("seed"),
           py::arg("sample_scale"))
      .def("computed_at_once", &DropoutSite::computed_at_once, py::arg("reason"))
      .def_property_readonly("last", &DropoutSite::last);
  m.def("expect_sum", &expect_sum, py::arg("t"), py::arg("least_bytes"));
  m.def("normalise_sum", &normalise_sum, py::arg("sum"), py::arg("function"));
  m.def("run_dropout_with", &run_dropout_with, py::arg("function"));
}

}  // namespace gradfuse
