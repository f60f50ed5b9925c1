// Tensors that wait: what follows them may run in the same op.
//
// Such an output is a torch.Tensor with shape, strides, dtype, device and grad_fn, and no memory.
// Whoever asks for its memory gets the value, computed then: the tensor becomes an ordinary one.
// A dispatch key of its own, above autograd and autocast, lets the fallback in deferred_ops.cpp see
// each op that takes it. What waits is a batch norm (deferred_batch_norm.h), or a dropout and the
// sum of a residual that may go into a norm (deferred_sum.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <c10/core/AutogradState.h>
#include <c10/core/Stream.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/function.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../math/activation.h"
#include "waiting.h"

namespace gradfuse {

// Torch keeps this key for tensors of other libraries that compute later.
constexpr c10::DispatchKey kDeferredKey = c10::DispatchKey::DeferredInit;

// What a module of a model did last. The module owns it, and each of its calls refers to it.
struct SiteRecord {
  bool has_run = false;
  bool was_added = false;  // a residual was
  bool was_normalised = false;  // of a dropout
  Activation activation = Activation::None;
  // Why the output was computed before what might have taken it: the operator that did, or a text.
  std::string reason;
};

// Thread-local settings that decide what an op means.
struct Modes {
  c10::DispatchKeySet included, excluded;
  bool has_grad, is_inference;

  static Modes now();
  bool operator==(const Modes& other) const;
};

// Restores the modes of a call, and leaves saved tensors to no hooks, as the call had none.
class ModesGuard {
 public:
  explicit ModesGuard(const Modes& modes);
  ~ModesGuard();
  ModesGuard(const ModesGuard&) = delete;
  ModesGuard& operator=(const ModesGuard&) = delete;

 private:
  struct Saved;
  std::unique_ptr<Saved> saved_;
};

// A tensor that a deferred call reads, and how often it had been written to.
struct Watched {
  const char* name;
  at::Tensor tensor;
  const void* memory;
  uint32_t version;

  Watched(const char* name, at::Tensor tensor);
  void check(const char* op) const;  // throws std::runtime_error if it was written to since
};

// The stream of a call, on a device that has streams.
class CallStream {
 public:
  explicit CallStream(c10::Device device);
  // Lets the allocator know that another stream than the call's reads the tensor, if one does.
  void keep(const at::Tensor& t) const;

 private:
  std::optional<c10::Stream> stream_;
};

using NodePtr = decltype(torch::autograd::Edge::function);

// What is computed when a value is needed; the tensor and its node of the graph share it.
class Pending {
 public:
  explicit Pending(const Modes& modes) : modes(modes) {}
  virtual ~Pending() = default;
  Pending(const Pending&) = delete;
  Pending& operator=(const Pending&) = delete;

  // The value in the modes of the call.
  at::Tensor compute();
  // What the value is computed from.
  virtual void for_each_input(c10::function_ref<void(const Watched&)> f) const = 0;
  // Where the gradients go that `backward` gives. Those of the inputs, unless overridden.
  virtual torch::autograd::edge_list edges() const;
  // By default those of the node that the value has by itself, which is computed at the latest now.
  virtual torch::autograd::variable_list backward(torch::autograd::variable_list grads);
  // Whether the value's own node takes the place of the one that waited.
  virtual bool has_inner() const { return true; }
  // Notes that the value was computed for the named operator or reason.
  virtual void finish(const char* reason) = 0;
  // Lets the inputs go, unless the node may have to compute the value yet. Nothing waits any more.
  virtual void forget() = 0;
  virtual const char* node_name() const = 0;

  const Modes modes;
  torch::autograd::Edge inner;  // of the value

 private:
  virtual at::Tensor value() = 0;  // in the modes of the call
};

// Tensors that outputs wait for. Each carries the key as well, so that the fallback sees a write to
// it in time; a write through an older view is seen by the version counter, and then raises.
void materialize_waiting_for(const at::Tensor& written, const char* name);
// Whether an output waits for the tensor's memory.
bool is_waited_for(const at::Tensor& t);

// The key on a tensor that nobody waits for: the next op that takes it goes through the fallback,
// which removes the key from it.
void add_key(const at::Tensor& t);
void remove_stray_key(const at::Tensor& t);

class DeferredTensor final : public c10::TensorImpl {
 public:
  DeferredTensor(const at::Tensor& like, c10::IntArrayRef strides);
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
  // What it waits for, if that is of this type; else null.
  template <class P>
  std::shared_ptr<P> pending_as() const {
    return std::dynamic_pointer_cast<P>(pending_);
  }
  // Whether what is done with it now means the same as in its call.
  bool is_as_called() const;
  // Whether, besides, nobody holds its node or listens to its gradient, so that both may be
  // replaced.
  bool may_go_on() const;
  // Runs f while the inputs do not carry the key, which tensors saved for the backward would keep.
  void without_key(c10::function_ref<void()> f);
  // Becomes another value, that of an op in place.
  void become(const at::Tensor& value);
  // Gets its value from an op that computed it on the way.
  void fill(const at::Tensor& value);
  // Waits for more, that of `out += residual`.
  void wait_for(std::shared_ptr<Pending> pending);

 private:
  at::Tensor self();
  bool is_observed() const;
  void adopt(const at::Tensor& value);
  void set_waiting(bool waits);
  void stop_waiting();
  void set_node();

  std::shared_ptr<Pending> pending_;  // null once the value is there
  NodePtr node_;  // null if no gradient is wanted
  std::atomic<bool> waits_{false};
  std::recursive_mutex mutex_;  // of all above; Python code may come back while it computes
};

// A tensor that waits for the value, which has these strides.
at::Tensor make_deferred(std::shared_ptr<Pending> pending, const at::Tensor& like,
                         c10::IntArrayRef strides);

// How many tensors are waited for, each as often as it is.
int64_t count_waiting();

// Whether the key is this module's, whose fallback deferred_ops.cpp has. Else nothing may wait.
bool owns_key();
// Whether something but autograd sees each op or saved tensor, so that none may be put off.
bool is_watched();
// Whether a call may wait: it is not watched, and no backward runs, as of a checkpoint.
bool may_wait();

// Puts an op's result in the place of its arguments.
void replace_arguments(torch::jit::Stack* stack, size_t count, const at::Tensor& result);
bool is_one(const c10::IValue& alpha);

// Python's exceptions as torch passes them through its operators.
void with_torch_errors(c10::function_ref<void()> f);

}  // namespace gradfuse
