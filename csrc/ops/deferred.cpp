#include "deferred.h"

#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <unordered_map>

#include "../tensor/checks.h"

namespace gradfuse {

namespace py = pybind11;
namespace autograd = torch::autograd;

namespace {

c10::impl::LocalDispatchKeySet keys_of(const Modes& modes) {
  c10::impl::PODLocalDispatchKeySet keys = {};
  keys.set_included(modes.included);
  keys.set_excluded(modes.excluded);
  return keys;
}

// Runs the backward of a value that is computed at the latest when its gradient is there.
struct DeferredBackward final : autograd::Node {
  DeferredBackward(std::shared_ptr<Pending> pending, autograd::edge_list edges)
      : Node(std::move(edges)), name_(pending->node_name()), pending(std::move(pending)) {}

  std::string name() const override { return name_; }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    TORCH_CHECK(pending,
                "Trying to backward through the graph a second time; specify retain_graph=True "
                "the first time");
    autograd::variable_list found = pending->backward(std::move(grads));
    found.resize(num_outputs());
    return found;
  }

  void release_variables() override {
    if (!pending || !pending->has_inner()) return;
    if (pending->inner.is_valid()) pending->inner.function->release_variables();
    pending = nullptr;
  }

  const char* const name_;
  std::shared_ptr<Pending> pending;
};

// A node as this version of torch holds it.
template <class Pointer, class T, class... Args>
Pointer make(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<autograd::Node>>)
    return std::make_shared<T>(std::forward<Args>(args)...);
  else
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
}

NodePtr make_node(std::shared_ptr<Pending> pending) {
  autograd::edge_list edges = pending->edges();
  const bool is_wanted =
      std::any_of(edges.begin(), edges.end(), [](const auto& edge) { return edge.is_valid(); });
  if (!is_wanted) return nullptr;
  return make<NodePtr, DeferredBackward>(std::move(pending), std::move(edges));
}

c10::DispatchKeySet keys_like(const at::Tensor& t) {
  return c10::DispatchKeySet(c10::computeDispatchKey(t.scalar_type(), t.layout(), t.device()))
      .add(kDeferredKey);
}

// The key set of any tensor, which torch lets its subclasses change.
struct KeySetAccess : c10::TensorImpl {
  static c10::DispatchKeySet& of(const at::Tensor& t) {
    return t.unsafeGetTensorImpl()->*(&KeySetAccess::key_set_);
  }
};

const void* memory_of(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// Who waits for which memory.
class WaitingList {
 public:
  void add(const Watched& watched, DeferredTensor* waiting) {
    const at::Tensor& awaited = watched.tensor;
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.emplace(watched.memory, Entry{awaited.unsafeGetTensorImpl(), waiting});
    c10::DispatchKeySet& keys = KeySetAccess::of(awaited);
    keys = keys.add(kDeferredKey);
  }

  size_t size() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_.size();
  }

  void remove(const Watched& watched, const DeferredTensor* waiting) {
    const at::Tensor& awaited = watched.tensor;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto [begin, end] = entries_.equal_range(watched.memory);
    const c10::TensorImpl* const impl = awaited.unsafeGetTensorImpl();
    auto found = end;
    bool has_others = false;
    for (auto it = begin; it != end; ++it) {
      if (it->second.awaited != impl) continue;
      if (it->second.waiting == waiting && found == end)
        found = it;
      else
        has_others = true;
    }
    if (found != end) entries_.erase(found);
    c10::DispatchKeySet& keys = KeySetAccess::of(awaited);
    if (!has_others) keys = keys.remove(kDeferredKey);
  }

  void add_key(const at::Tensor& t) {
    const std::lock_guard<std::mutex> lock(mutex_);
    c10::DispatchKeySet& keys = KeySetAccess::of(t);
    keys = keys.add(kDeferredKey);
  }

  void remove_stray_key(const at::Tensor& t) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (entries_.count(memory_of(t)) != 0) return;
    c10::DispatchKeySet& keys = KeySetAccess::of(t);
    keys = keys.remove(kDeferredKey);
  }

  bool has_memory_of(const at::Tensor& t) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_.count(memory_of(t)) != 0;
  }

  // Alive, and in the order in which they began to wait.
  std::vector<at::Tensor> waiting_for(const at::Tensor& written) {
    std::vector<at::Tensor> found;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto [begin, end] = entries_.equal_range(memory_of(written));
    for (auto it = begin; it != end; ++it) add_if_alive(found, it->second);
    return found;
  }

  std::vector<at::Tensor> all_waiting() {
    std::vector<at::Tensor> found;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& entry : entries_) add_if_alive(found, entry.second);
    return found;
  }

 private:
  struct Entry {
    const c10::TensorImpl* awaited;
    DeferredTensor* waiting;
  };

  // One whose last reference is gone is about to remove itself.
  static void add_if_alive(std::vector<at::Tensor>& found, const Entry& entry) {
    auto alive = c10::weak_intrusive_ptr<c10::TensorImpl>::reclaim_copy(entry.waiting).lock();
    if (alive) found.emplace_back(std::move(alive));
  }

  std::mutex mutex_;
  std::unordered_multimap<const void*, Entry> entries_;
};

WaitingList& waiting_list() {
  static auto* const list = new WaitingList;  // tensors may outlive static objects
  return *list;
}

}  // namespace

void materialize_waiting_for(const at::Tensor& written, const char* name) {
  for (const at::Tensor& t : waiting_list().waiting_for(written))
    if (DeferredTensor* const deferred = DeferredTensor::of(t)) deferred->materialize(name);
}

void materialize_all(const char* reason) {
  if (!waiting_list().size()) return;
  for (const at::Tensor& t : waiting_list().all_waiting())
    if (DeferredTensor* const deferred = DeferredTensor::of(t)) deferred->materialize(reason);
}

bool is_waited_for(const at::Tensor& t) { return waiting_list().has_memory_of(t); }

void add_key(const at::Tensor& t) { waiting_list().add_key(t); }

void remove_stray_key(const at::Tensor& t) {
  if (t.defined() && t.key_set().has(kDeferredKey) && !DeferredTensor::of(t))
    waiting_list().remove_stray_key(t);
}

Modes Modes::now() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  const c10::AutogradState& state = c10::AutogradState::get_tls_state();
  return {keys.included_, keys.excluded_, state.get_grad_mode(), state.get_inference_mode()};
}

bool Modes::operator==(const Modes& other) const {
  return included == other.included && excluded == other.excluded && has_grad == other.has_grad &&
         is_inference == other.is_inference;
}

Watched::Watched(const char* name, at::Tensor tensor)
    : name(name), tensor(std::move(tensor)), memory(memory_of(this->tensor)), version(0) {
  if (!this->tensor.is_inference()) version = this->tensor._version();
}

void Watched::check(const char* op) const {
  if (memory_of(tensor) == memory && (tensor.is_inference() || tensor._version() == version))
    return;
  fail<std::runtime_error>(op, ": ", name,
                           " must not be written to before the output is used, got another version "
                           "or memory; use the output first or set GRADFUSE_DEFER=0");
}

struct ModesGuard::Saved {
  c10::impl::ForceDispatchKeyGuard keys;
  c10::AutogradState state;
  at::impl::SavedTensorDefaultHooksTLS hooks;
};

ModesGuard::ModesGuard(const Modes& modes)
    : saved_(new Saved{c10::impl::ForceDispatchKeyGuard(keys_of(modes)),
                       c10::AutogradState::get_tls_state(),
                       at::SavedTensorDefaultHooks::get_tls_state()}) {
  c10::AutogradState state = saved_->state;
  state.set_grad_mode(modes.has_grad);
  state.set_inference_mode(modes.is_inference);
  c10::AutogradState::set_tls_state(state);
  if (!saved_->hooks.stack.empty()) at::SavedTensorDefaultHooks::set_tls_state({});
}

ModesGuard::~ModesGuard() {
  c10::AutogradState::set_tls_state(saved_->state);
  if (!saved_->hooks.stack.empty()) at::SavedTensorDefaultHooks::set_tls_state(saved_->hooks);
}

CallStream::CallStream(c10::Device device) {
  if (!device.is_cpu()) stream_ = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

void CallStream::keep(const at::Tensor& t) const {
  if (!stream_) return;
  const c10::impl::VirtualGuardImpl device(stream_->device_type());
  const c10::Stream now = device.getStream(stream_->device());
  if (now != *stream_) device.recordDataPtrOnStream(t.storage().data_ptr(), now);
}

void with_torch_errors(c10::function_ref<void()> f) {
  try {
    f();
  } catch (py::error_already_set& error) {
    error.restore();
    python_error raised;
    raised.persist();
    throw raised;
  }
}

autograd::edge_list Pending::edges() const {
  autograd::edge_list found;
  for_each_input(
      [&](const Watched& input) { found.push_back(autograd::impl::gradient_edge(input.tensor)); });
  return found;
}

autograd::variable_list Pending::backward(autograd::variable_list grads) {
  if (!inner.is_valid()) compute();
  autograd::variable_list of_results(inner.function->num_inputs());
  of_results[inner.input_nr] = std::move(grads[0]);
  return (*inner.function)(std::move(of_results));
}

at::Tensor Pending::compute() {
  at::Tensor found = value();
  if (found.grad_fn()) inner = autograd::impl::gradient_edge(found);
  return found;
}

DeferredTensor::DeferredTensor(const at::Tensor& like, c10::IntArrayRef strides)
    : TensorImpl(keys_like(like), like.dtype(), like.device()) {
  set_sizes_and_strides(like.sizes(), strides);
}

// Without weak references torch does not call release_resources.
DeferredTensor::~DeferredTensor() { stop_waiting(); }

DeferredTensor* DeferredTensor::of(const at::Tensor& t) {
  if (!t.defined() || !t.key_set().has(kDeferredKey)) return nullptr;
  auto* const deferred = dynamic_cast<DeferredTensor*>(t.unsafeGetTensorImpl());
  return deferred && deferred->waits_ ? deferred : nullptr;
}

bool DeferredTensor::has_storage() const {
  const_cast<DeferredTensor*>(this)->materialize("access to its memory");
  return TensorImpl::has_storage();
}

const c10::Storage& DeferredTensor::storage() const {
  const_cast<DeferredTensor*>(this)->materialize("access to its memory");
  return TensorImpl::storage();
}

c10::intrusive_ptr<c10::TensorImpl> DeferredTensor::shallow_copy_and_detach(
    const c10::VariableVersion& version, bool allow_change) const {
  const_cast<DeferredTensor*>(this)->materialize("a detached copy");
  return TensorImpl::shallow_copy_and_detach(version, allow_change);
}

c10::intrusive_ptr<c10::TensorImpl> DeferredTensor::shallow_copy_and_detach(
    c10::VariableVersion&& version, bool allow_change) const {
  const_cast<DeferredTensor*>(this)->materialize("a detached copy");
  return TensorImpl::shallow_copy_and_detach(std::move(version), allow_change);
}

void DeferredTensor::shallow_copy_from(const c10::intrusive_ptr<TensorImpl>& impl) {
  materialize("a write to its .data");
  TensorImpl::shallow_copy_from(impl);
}

void DeferredTensor::release_resources() {
  stop_waiting();
  TensorImpl::release_resources();
}

std::unique_lock<std::recursive_mutex> DeferredTensor::lock() {
  // Not while this thread holds the GIL, which a thread that computes the value needs.
  std::optional<py::gil_scoped_release> release;
  if (Py_IsInitialized() && PyGILState_Check()) release.emplace();
  return std::unique_lock<std::recursive_mutex>(mutex_);
}

void DeferredTensor::materialize(const char* reason) {
  if (!waits_) return;
  const std::unique_lock<std::recursive_mutex> held = lock();
  if (!waits_) return;
  const bool keeps_node = !pending_->has_inner() || is_observed();
  at::Tensor value;
  without_key([&] { value = pending_->compute(); });
  adopt(value);
  if (node_ && !keeps_node)
    autograd::impl::set_gradient_edge(self(), autograd::impl::gradient_edge(value));
  const std::shared_ptr<Pending> pending = pending_;
  stop_waiting();
  pending->finish(reason);  // the node of the graph, if it stays, has what it needs
}

void DeferredTensor::without_key(c10::function_ref<void()> f) {
  const std::shared_ptr<Pending> held = pending_;
  set_waiting(false);
  try {
    f();
  } catch (...) {
    set_waiting(true);
    throw;
  }
  set_waiting(true);
}

void DeferredTensor::set_waiting(bool waits) {
  pending_->for_each_input([&](const Watched& input) {
    if (waits)
      waiting_list().add(input, this);
    else
      waiting_list().remove(input, this);
  });
}

void DeferredTensor::stop_waiting() {
  waits_ = false;
  if (pending_) {
    set_waiting(false);
    pending_->forget();
  }
  pending_ = nullptr;
  node_ = NodePtr();
}

void DeferredTensor::become(const at::Tensor& value) {
  adopt(value);
  if (value.grad_fn())
    autograd::impl::set_gradient_edge(self(), autograd::impl::gradient_edge(value));
  stop_waiting();
}

void DeferredTensor::fill(const at::Tensor& value) {
  adopt(value);
  stop_waiting();
}

void DeferredTensor::wait_for(std::shared_ptr<Pending> pending) {
  stop_waiting();
  pending_ = std::move(pending);
  waits_ = true;
  set_waiting(true);
  set_node();
}

at::Tensor DeferredTensor::self() {
  return at::Tensor(c10::intrusive_ptr<TensorImpl>::reclaim_copy(this));
}

void DeferredTensor::adopt(const at::Tensor& value) {
  storage_ = value.storage();
  set_sizes_and_strides(value.sizes(), value.strides(), value.storage_offset());
  // Later writes to this tensor are then seen by nodes that saved the value.
  if (!is_inference()) set_version_counter(value.unsafeGetTensorImpl()->version_counter());
  key_set_ = key_set_.remove(kDeferredKey);
}

void DeferredTensor::set_node() {
  node_ = pending_->modes.has_grad ? make_node(pending_) : NodePtr();
  if (node_) autograd::set_history(self(), node_);
}

bool DeferredTensor::is_as_called() const {
  return pending_ && pending_->modes == Modes::now() && !is_watched();
}

bool DeferredTensor::may_go_on() const { return is_as_called() && !is_observed(); }

// Whether somebody may hold the node or listen to the tensor's gradient.
bool DeferredTensor::is_observed() const {
  const auto* const meta = static_cast<const autograd::AutogradMeta*>(autograd_meta());
  if (!node_) return meta && (meta->grad_fn_ || meta->requires_grad_);
  // Two holders: this object and the tensor's metadata.
  return meta->grad_fn_ != node_ || node_.use_count() != 2 || !meta->hooks_.empty() ||
         meta->retains_grad_;
}

int64_t count_waiting() { return static_cast<int64_t>(waiting_list().size()); }

at::Tensor make_deferred(std::shared_ptr<Pending> pending, const at::Tensor& like,
                         c10::IntArrayRef strides) {
  auto impl = c10::make_intrusive<DeferredTensor>(like, strides);
  DeferredTensor& deferred = *impl;
  const at::Tensor t(std::move(impl));
  deferred.wait_for(std::move(pending));
  return t;
}

}  // namespace gradfuse
