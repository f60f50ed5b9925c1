// Outputs of batch norm that wait: a residual and an activation that follow run in the same op.
//
// Such an output is a torch.Tensor with shape, strides, dtype, device and grad_fn, and no memory.
// Whoever asks for its memory gets the value, computed then: the tensor becomes an ordinary one.
// A dispatch key of its own, above autograd and autocast, lets the fallback in deferred_ops.cpp see
// each op that takes it.
#pragma once

#include <pybind11/pybind11.h>

#include <ATen/core/Tensor.h>
#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/edge.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../tensor/python_args.h"
#include "batch_norm_call.h"
#include "waiting.h"

namespace gradfuse {

namespace py = pybind11;

// Torch keeps this key for tensors of other libraries that compute later.
constexpr c10::DispatchKey kDeferredKey = c10::DispatchKey::DeferredInit;

// What a batch norm of a model did last. The module owns it, and each of its calls refers to it.
struct SiteRecord {
  bool has_run = false;
  bool has_residual = false;
  Activation activation = Activation::None;
  // Why the output was computed before an activation: the operator that took it, or a text.
  std::string reason;
};

// Thread-local settings that decide what an op means.
struct Modes {
  c10::DispatchKeySet included, excluded;
  bool has_grad, is_inference;

  static Modes now();
  bool operator==(const Modes& other) const;
};

// A tensor that a deferred call reads, and how often it had been written to.
struct Watched {
  const char* name;
  at::Tensor tensor;
  const void* memory;
  uint32_t version;

  Watched(const char* name, at::Tensor tensor);
  void check() const;  // throws std::runtime_error if it was written to since
};

// A batch norm that its module has called. Outputs that wait for it share it.
class DeferredCall {
 public:
  DeferredCall(py::tuple arguments, const BatchNormForwardCall& call,
               std::shared_ptr<SiteRecord> site);
  ~DeferredCall();
  DeferredCall(const DeferredCall&) = delete;
  DeferredCall& operator=(const DeferredCall&) = delete;

  // act(batch_norm(input) + residual) in the modes of the call, with its gradient.
  at::Tensor compute(const std::optional<Watched>& residual, Activation activation,
                     double negative_slope);
  // Updates the running statistics, if no result did that so far.
  void count();

  const Modes modes;
  const std::shared_ptr<SiteRecord> site;
  const std::vector<Watched>& inputs() const { return inputs_; }

 private:
  py::tuple arguments_;  // a BatchNormCall
  std::vector<Watched> inputs_;  // input, weight, bias
  bool has_to_count_;
  std::optional<c10::Stream> stream_;  // of the call, on a device that has streams

  // Lets the allocator know that another stream than the call's reads the inputs.
  void keep_for_other_stream(const std::optional<Watched>& residual) const;
};

using NodePtr = decltype(torch::autograd::Edge::function);

// What is computed when a value is needed; the tensor and its node of the graph share it.
class Pending {
 public:
  Pending(std::shared_ptr<DeferredCall> call, std::optional<Watched> residual)
      : call(std::move(call)), residual(std::move(residual)) {}

  // The value, and in `inner` its node, whose gradients are those of the call.
  at::Tensor compute();

  std::shared_ptr<DeferredCall> call;
  std::optional<Watched> residual;
  NodePtr inner;
};

// Tensors that outputs wait for. Each carries the key as well, so that the fallback sees a write to
// it in time; a write through an older view is seen by the version counter, and then raises.
void materialize_waiting_for(const at::Tensor& written, const char* name);
// Takes the key from a view or copy of such a tensor, once nobody waits for its memory.
void remove_stray_key(const at::Tensor& t);

class DeferredTensor final : public c10::TensorImpl {
 public:
  explicit DeferredTensor(const at::Tensor& like);
  ~DeferredTensor() override;

  // The implementation of a tensor that waits, else null.
  static DeferredTensor* of(const at::Tensor& t);

  bool has_storage() const override;
  const c10::Storage& storage() const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(const c10::VariableVersion& version,
                                                         bool allow_change) const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(c10::VariableVersion&& version,
                                                         bool allow_change) const override;
  void shallow_copy_from(const c10::intrusive_ptr<TensorImpl>& impl) override;
  void release_resources() override;

  // Computes the value, for the named operator or reason.
  void materialize(const char* reason);

  // To be held by who calls what follows.
  std::unique_lock<std::recursive_mutex> lock();
  const std::shared_ptr<Pending>& pending() const { return pending_; }
  // Whether somebody may hold the node or listen to the tensor's gradient, so that neither may be
  // replaced.
  bool is_observed() const;
  // act of the value that it waits for, which it goes on waiting for.
  at::Tensor compute(Activation activation, double negative_slope);
  // Becomes another value, that of an op in place.
  void become(const at::Tensor& value);
  // Waits for more, that of `out += residual`.
  void wait_for(std::shared_ptr<Pending> pending);

 private:
  at::Tensor self();
  void adopt(const at::Tensor& value);
  void set_waiting(bool waits);
  void stop_waiting();
  void set_node();

  std::shared_ptr<Pending> pending_;  // null once the value is there
  NodePtr node_;  // null if no gradient is wanted
  std::atomic<bool> waits_{false};
  std::recursive_mutex mutex_;  // of all above; Python code may come back while it computes
};

// A tensor that waits for the call.
at::Tensor make_deferred(std::shared_ptr<DeferredCall> call, std::optional<Watched> residual,
                         const at::Tensor& like);

// How many tensors are waited for, each as often as it is.
int64_t count_waiting();

// Sets the Python function that runs a BatchNormCall with its gradient.
void run_deferred_with(FunctionArg function);

}  // namespace gradfuse
