// A dropout that waits for the residual it is added to, and the sum, which waits for a norm.
//
// The sum of two ordinary tensors waits as well if one of them is expected to be added and
// normalised: the input of a norm, to which its block's output is added, and what a dropout lets
// through as it is.
#pragma once

#include <pybind11/pybind11.h>

#include "../tensor/storage.h"
#include "deferred.h"

namespace gradfuse {

// What is done with an addend: x * sample_scale, of which a dropout leaves out a share p.
struct Dropped {
  double p = 0.0;
  MaybeTensor seed;          // int64 [2], null for no dropout
  MaybeTensor sample_scale;  // [N], null for ones
  std::vector<std::shared_ptr<SiteRecord>> sites;  // the modules that asked for it

  bool is_identity() const { return !seed && !sample_scale; }
  void note(bool was_added, bool was_normalised, const std::string& reason) const;
};

// dropout(input) + residual, or the first alone. Its node is that of the program: the sum's leads
// to the dropout's and the residual's, whatever computes their values.
class PendingSum final : public Pending {
 public:
  // `own` is the part of the dropout of which the gradient is this node's.
  PendingSum(Watched input, std::optional<Watched> residual, Dropped dropout, Dropped own,
             torch::autograd::edge_list edges);

  void for_each_input(c10::function_ref<void(const Watched&)> f) const override;
  torch::autograd::edge_list edges() const override { return edges_; }
  torch::autograd::variable_list backward(torch::autograd::variable_list grads) override;
  bool has_inner() const override { return false; }
  void finish(const char* reason) override { dropout.note(adds_, false, reason); }
  void forget() override { input = residual = std::nullopt; }
  const char* node_name() const override { return adds_ ? "AddBackward" : "DropoutBackward"; }
  // Before the inputs are read.
  void check() const;

  std::optional<Watched> input, residual;
  const Dropped dropout;

 private:
  at::Tensor value() override;

  const bool adds_;
  const Dropped own_;
  const torch::autograd::edge_list edges_;
  CallStream stream_;
};

// self + other, as a sum that waits. False if there is no reason to wait or it may not.
bool add_for_norm(torch::jit::Stack* stack, const char* name);

void bind_deferred_sum(pybind11::module_& m);

}  // namespace gradfuse
