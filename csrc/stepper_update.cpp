// A Stepper's step: a walk that checks what it holds, then the norm, then the update.
#include "stepper.h"

#include <cstring>

#include "device.h"

namespace gradfuse {
namespace {

void announce_write(const at::Tensor& t) {
  if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Asks for what announce_write reads, and when it is there for the counter that it changes.
void prefetch_version_field(const at::Tensor& t) {
  if (!t.defined()) return;
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  __builtin_prefetch(&impl->version_counter());
  __builtin_prefetch(impl + 1, 0);  // the keys, which are the last of its fields
}
void prefetch_version(const at::Tensor& t) {
  if (!t.defined()) return;
  // It is what a VariableVersion points to, and keeps to itself.
  const c10::VariableVersion& version = t.unsafeGetTensorImpl()->version_counter();
  static_assert(sizeof(version) == sizeof(void*));
  const void* counter;
  std::memcpy(&counter, &version, sizeof(counter));
  __builtin_prefetch(counter, 1);
}

// The totals of gradients that were multiplied already.
at::Tensor without_factor(const at::Tensor& totals) {
  const at::Tensor out = dense_copy(totals, totals.strides());
  out.select(0, 6).fill_(1.0);
  out.select(0, 7).zero_();
  return out;
}

// A parameter and its gradient as they are updated: dense copies where they have gaps in memory.
struct Updated {
  size_t list;
  int32_t row;
  at::Tensor param, grad;
};

}  // namespace

ClipResult Stepper::measure(double max_norm, NonFinite policy,
                            const LossScaleTensors& scale) const {
  return plan_step(op(), check_gradients(op(), gradients(), false), max_norm, norm_spec(2.0),
                   policy, scale);
}

ClipResult Stepper::step(const std::vector<GroupOptions>& groups,
                         const std::vector<MaybeTensor>& lr_values, double max_norm,
                         NonFinite policy, const LossScaleTensors& scale,
                         const StepOptions& options) {
  Walk found = walk();
  const ClipResult result = plan_step(op(), found.grads, max_norm, norm_spec(2.0), policy, scale);
  apply(found, groups, lr_values, result.totals, std::nullopt, options);
  return result;
}

void Stepper::update(const std::vector<GroupOptions>& groups,
                     const std::vector<MaybeTensor>& lr_values, const MaybeTensor& totals,
                     const MaybeTensor& coefficients, const StepOptions& options) {
  Walk found = walk();
  apply(found, groups, lr_values, totals, coefficients, options);
}

void Stepper::announce_writes(const std::vector<ParamRef>& params) const {
  constexpr size_t kFar = 12, kNear = 6;
  for (size_t k = 0; k < params.size(); ++k) {
    if (k + kFar < params.size()) {
      const Held& h = held_[params[k + kFar].row];
      prefetch_version_field(h.param);
      for (const at::Tensor& t : h.tensors) prefetch_version_field(t);
    }
    if (k + kNear < params.size()) {
      const Held& h = held_[params[k + kNear].row];
      prefetch_version(h.param);
      for (const at::Tensor& t : h.tensors) prefetch_version(t);
    }
    const Held& h = held_[params[k].row];
    announce_write(h.param);
    for (const at::Tensor& t : h.tensors) announce_write(t);
  }
}

void Stepper::apply(Walk& found, const std::vector<GroupOptions>& groups,
                    const std::vector<MaybeTensor>& lr_values, const MaybeTensor& totals,
                    const MaybeTensor& coefficients, const StepOptions& options) {
  MaybeTensor plan = totals, each = coefficients;
  if (options.materialize && totals) {
    GradList grads = check_gradients(op(), found.grads.tensors, true);
    apply_totals(grads, *totals, coefficients);
    plan = without_factor(*totals);
    each = std::nullopt;
    for (std::vector<ParamRef>& params : found.params)  // writing may have moved them
      for (ParamRef& r : params) r.grad = found.grads.tensors[r.row].const_data_ptr();
  }
  for (const std::vector<ParamRef>& params : found.params) announce_writes(params);
  std::vector<Updated> odd;
  for (const auto& [list, place] : found.odd) {
    ParamRef& ref = found.params[list][place];
    const Held& h = held_[ref.row];
    Updated u = {list, ref.row, h.param, found.grads.tensors[ref.row]};
    const at::Tensor& like = layout_of(h);
    at::Tensor dense = like;
    if (!like.is_non_overlapping_and_dense()) dense = at::empty(like.sizes(), like.options());
    if (!same_strides(u.param, dense)) u.param = dense_copy(u.param, dense.strides());
    if (!same_strides(u.grad, dense) || u.grad.is_neg() || u.grad.is_conj())
      u.grad = dense_copy(u.grad.resolve_conj().resolve_neg(), dense.strides());
    ref = ref_of(h, u.param, u.grad, ref.row, true);
    odd.push_back(std::move(u));
  }
  for (size_t list = 0; list < found.params.size(); ++list) {
    const at::Device device = found.grads.groups[list].device;
    OptimStep step = {rule_,
                      std::move(found.params[list]),
                      groups,
                      {nullptr, nullptr, options.bound},
                      options.update_clip,
                      options.stochastic_rounding};
    const bool host = is_host(device);
    const auto here = [&](const MaybeTensor& t) {
      if (!t) return MaybeTensor();
      return MaybeTensor(host ? on_host(*t) : t->to(device));
    };
    const MaybeTensor plan_here = here(plan), each_here = here(each);
    if (plan_here) step.use.totals = plan_here->const_data_ptr<double>();
    if (each_here) step.use.coefficients = each_here->const_data_ptr<double>();
    std::vector<at::Tensor> lrs;
    for (size_t g = 0; g < groups.size(); ++g) {
      if (!lr_values[g]) continue;
      lrs.push_back(converted(lr_values[g]->to(device), at::kFloat));
      if (host)
        step.groups[g].lr = *lrs.back().const_data_ptr<float>();
      else
        step.groups[g].lr_value = lrs.back().const_data_ptr<float>();
    }
    if (host) {
      cpu::optim_step(step);
    } else {
#if defined(GRADFUSE_CUDA)
      on_device(device, [&](cudaStream_t stream) {
        const at::Tensor scratch = empty_on_device(
            {cuda::optim_scratch_bytes(step)}, at::TensorOptions().dtype(at::kByte).device(device));
        cuda::optim_step(step, scratch.mutable_data_ptr(), stream);
      });
#endif
    }
    for (const Updated& u : odd)
      if (u.list == list && !u.param.is_same(held_[u.row].param)) held_[u.row].param.copy_(u.param);
  }
}

}  // namespace gradfuse
