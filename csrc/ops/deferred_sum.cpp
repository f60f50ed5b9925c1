#include "deferred_sum.h"

#include <ATen/ops/add.h>
#include <c10/util/strides.h>

#include "../tensor/checks.h"
#include "../tensor/python_args.h"

namespace gradfuse {

namespace py = pybind11;

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
  if (!pending || pending->residual || !deferred->may_go_on()) return std::nullopt;
  return Offered{*pending->input, pending->dropout};
}

// Whether a norm's module marked the tensor, see expect_sum.
bool is_marked(const at::Tensor& t) {
  return t.key_set().has(kDeferredKey) && !DeferredTensor::of(t) && !is_waited_for(t);
}

// Whether gradfuse's ops read the tensor's memory as it is.
bool is_dense(const at::Tensor& t) { return t.layout() == at::kStrided && !is_wrapper(t); }

// Whether the sum has the residual's dtype, shape and order in memory.
bool can_add(const at::Tensor& input, const at::Tensor& residual) {
  return is_dense(input) && is_dense(residual) && residual.is_contiguous() &&
         input.device() == residual.device() && input.scalar_type() == residual.scalar_type() &&
         input.sizes() == residual.sizes();
}

at::Tensor make_contiguous_deferred(std::shared_ptr<Pending> pending, const at::Tensor& like) {
  return make_deferred(std::move(pending), like, c10::contiguous_strides(like.sizes()));
}

}  // namespace

void Dropped::note(bool was_normalised, const std::string& reason) const {
  for (const auto& site : sites) *site = {true, was_normalised, Activation::None, reason};
}

PendingSum::PendingSum(Watched input, std::optional<Watched> residual, Dropped dropout)
    : Pending(Modes::now()),
      input(std::move(input)),
      residual(std::move(residual)),
      dropout(std::move(dropout)),
      stream_(this->input->tensor.device()) {}

void PendingSum::for_each_input(c10::function_ref<void(const Watched&)> f) const {
  const bool is_torch_add = dropout.is_identity();  // whose first argument is the residual
  if (residual && is_torch_add) f(*residual);
  if (input) f(*input);
  if (residual && !is_torch_add) f(*residual);
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
  if (dropout.is_identity()) return at::add(residual->tensor, input->tensor);
  return run_dropout(input->tensor, residual ? MaybeTensor(residual->tensor) : std::nullopt,
                     dropout);
}

void PendingSum::finish(const char* reason) {
  dropout.note(false, reason);
  input = residual = std::nullopt;
}

bool add_for_norm(torch::jit::Stack* stack, const char* name) {
  const auto arguments = torch::jit::last(stack, 3);
  at::Tensor residual = arguments[0].toTensor(), input = arguments[1].toTensor();
  if (!is_one(arguments[2]) || !residual.defined() || !input.defined() || residual.is_same(input) ||
      !may_wait())
    return false;
  std::optional<Offered> offered = offered_by(input);
  if (!offered && (offered = offered_by(residual))) std::swap(input, residual);
  if (offered) {
    input = offered->input.tensor;
  } else if (!is_marked(input) && !is_marked(residual)) {
    return false;
  } else if (!residual.is_contiguous()) {
    std::swap(input, residual);
  }
  // What else waits is computed: a first sum, or the other one of two dropouts.
  for (const at::Tensor& t : {residual, input})
    if (DeferredTensor* const waiting = DeferredTensor::of(t)) waiting->materialize(name);
  if (!can_add(input, residual)) return false;
  auto sum = std::make_shared<PendingSum>(offered ? offered->input : Watched("input", input),
                                          Watched("residual", residual),
                                          offered ? offered->dropout : Dropped{});
  replace_arguments(stack, 3, make_contiguous_deferred(std::move(sum), residual));
  return true;
}

namespace {

// A dropout module of a model, or one that drops paths: what it asks.
class DropoutSite {
 public:
  // An output that waits, or None where the call has to be computed at once.
  MaybeTensor defer(const at::Tensor& input, double p, const MaybeTensor& seed,
                    const MaybeTensor& sample_scale) {
    if (!may_wait()) return std::nullopt;
    std::optional<Offered> from = seed ? std::nullopt : offered_by(input);
    if (from && !from->dropout.sample_scale) {  // a path is dropped after a dropout
      from->dropout.sample_scale = sample_scale;
    } else {
      if (DeferredTensor* const waiting = DeferredTensor::of(input))
        waiting->materialize("a dropout");
      if (!is_dense(input)) return std::nullopt;
      from = Offered{Watched("input", input), Dropped{p, seed, sample_scale, {}}};
    }
    Dropped& dropout = from->dropout;
    dropout.sites.push_back(record_);
    *record_ = {true, false, Activation::None, "nobody used its output"};
    auto pending =
        std::make_shared<PendingSum>(std::move(from->input), std::nullopt, std::move(dropout));
    return make_contiguous_deferred(std::move(pending), input);
  }

  void computed_at_once(const std::string& reason) {
    *record_ = {true, false, Activation::None, reason};
  }

  // (whether a residual was added and normalised, why not); None before the first call.
  py::object last() const {
    if (!record_->has_run) return py::none();
    return py::make_tuple(record_->was_added, record_->reason);
  }

 private:
  std::shared_ptr<SiteRecord> record_ = std::make_shared<SiteRecord>();
};

// Lets the sum wait that the tensor is expected to be added to next, if it has that many bytes.
void expect_sum(const at::Tensor& t, size_t least_bytes) {
  if (t.nbytes() >= least_bytes && may_wait() && !t.key_set().has(kDeferredKey) && is_dense(t))
    add_key(t);
}

// (norm, whether a path was dropped, a dropout, a residual) of a sum or dropout that waits, which
// gets its value on the way: by function(input, residual, p, seed, sample_scale), whose result is
// (norm, sum). None of any other tensor; what cannot be taken up is computed first.
py::object normalise_sum(const at::Tensor& t, FunctionArg given) {
  const auto function = py::reinterpret_borrow<py::function>(given.object);
  DeferredTensor* const deferred = DeferredTensor::of(t);
  if (!deferred) return py::none();
  const auto held = deferred->lock();
  const auto sum = deferred->pending_as<PendingSum>();
  if (!sum || !deferred->may_go_on() || !may_wait()) {
    deferred->materialize("a norm");
    return py::none();
  }
  sum->check();
  const Dropped dropout = sum->dropout;
  const MaybeTensor residual = sum->residual ? MaybeTensor(sum->residual->tensor) : std::nullopt;
  py::tuple results;
  deferred->without_key([&] {
    results = function(sum->input->tensor, residual, dropout.p, dropout.seed, dropout.sample_scale);
  });
  deferred->become(results[1].cast<at::Tensor>());
  dropout.note(true, {});
  return py::make_tuple(results[0], dropout.sample_scale.has_value(), dropout.seed.has_value(),
                        residual.has_value());
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
