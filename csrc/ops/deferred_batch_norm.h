// A batch norm that its module has called, and whose output waits.
#pragma once

#include <pybind11/pybind11.h>

#include "../tensor/python_args.h"
#include "batch_norm_call.h"
#include "deferred.h"

namespace gradfuse {

// Outputs that wait for the call share it.
class DeferredCall {
 public:
  DeferredCall(pybind11::tuple arguments, const BatchNormForwardCall& call,
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
  pybind11::tuple arguments_;  // a BatchNormCall
  std::vector<Watched> inputs_;  // input, weight, bias
  bool has_to_count_;
  CallStream stream_;
};

// batch_norm(input) + residual.
class PendingBatchNorm final : public Pending {
 public:
  PendingBatchNorm(std::shared_ptr<DeferredCall> call, std::optional<Watched> residual)
      : Pending(call->modes), call(std::move(call)), residual(std::move(residual)) {}

  void for_each_input(c10::function_ref<void(const Watched&)> f) const override;
  void finish(const char* reason) override;
  void forget() override {}
  const char* node_name() const override { return "BatchNormActBackward"; }

  std::shared_ptr<DeferredCall> call;
  std::optional<Watched> residual;

 private:
  at::Tensor value() override { return call->compute(residual, Activation::None, 0.0); }
};

// self + other, where one of them is a batch norm that waits and takes the other up. False if it
// cannot.
bool add_to_batch_norm(torch::jit::Stack* stack, bool in_place, const char* name);
// The activation of a batch norm that waits. False if it cannot be taken up.
bool activate_batch_norm(torch::jit::Stack* stack, Activation activation, double negative_slope,
                         bool in_place, size_t count);

void bind_deferred_batch_norm(pybind11::module_& m);

}  // namespace gradfuse
