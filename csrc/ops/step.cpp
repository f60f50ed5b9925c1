#include "step.h"

#include <cstring>

#include "../math/prefetch.h"
#include "../tensor/dispatch.h"
#include "walk.h"

namespace gradfuse {
namespace {

void bump_version(const at::Tensor& t) {
  if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Asks for what bump_version reads, and when it is there for the counter that it changes.
void prefetch_version_field(const at::Tensor& t) {
  if (!t.defined()) return;
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  __builtin_prefetch(&impl->version_counter());
  __builtin_prefetch(impl + 1, 0);  // the keys, which are the last of its fields
}
void prefetch_version(const at::Tensor& t) {
  if (!t.defined()) return;
  // A VariableVersion is a pointer to it, which it keeps to itself.
  const c10::VariableVersion& version = t.unsafeGetTensorImpl()->version_counter();
  static_assert(sizeof(version) == sizeof(void*));
  const void* counter;
  std::memcpy(&counter, &version, sizeof(counter));
  __builtin_prefetch(counter, 1);
}

// Calls f with a parameter and each tensor of its state.
template <class F>
void for_each_tensor(const HeldParams::Held& h, F f) {
  f(h.param);
  for (const at::Tensor& t : h.tensors) f(t);
}

void bump_versions(const HeldParams& held, const std::vector<ParamRef>& params) {
  const auto all = [&](auto f) {
    return [&, f](size_t k) { for_each_tensor(held[params[k].row], f); };
  };
  prefetched(params.size(), all(bump_version), ahead(12, all(prefetch_version_field)),
             ahead(6, all(prefetch_version)));
}

// The plan for gradients that were multiplied already.
at::Tensor without_factor(const at::Tensor& plan) {
  const at::Tensor out = dense_copy(plan, plan.strides());
  constexpr int64_t kFactor = offsetof(ClipPlan, factor) / sizeof(double);
  out.select(0, kFactor).fill_(1.0);
  out.select(0, kFactor + 1).zero_();
  return out;
}

// How the gradients come into the update, where the host can hand it on.
struct Use {
  MaybeTensor plan, coefficients;

  Use on(at::Device device) const {
    const auto there = [&](const MaybeTensor& t) {
      if (!t) return MaybeTensor();
      return MaybeTensor(is_host(device) ? on_host(*t) : t->to(device));
    };
    return {there(plan), there(coefficients)};
  }
  GradientUse in_memory(double bound) const {
    return {plan ? plan_in(*plan) : nullptr,
            coefficients ? coefficients->const_data_ptr<double>() : nullptr, bound};
  }
};

// Does to the gradients what the plan says; what is left of it comes back.
Use materialize(const HeldParams& held, Walk& found, const Use& use) {
  GradList grads = check_gradients(held.op(), found.grads.tensors, true);
  apply_plan(grads, *use.plan, use.coefficients);
  for (std::vector<ParamRef>& params : found.params)  // writing may have moved them
    for (ParamRef& r : params) r.grad = found.grads.tensors[r.row].const_data_ptr();
  return {without_factor(*use.plan), std::nullopt};
}

// A parameter and its gradient in the layout of the update: dense copies where they have gaps.
struct Laid {
  int32_t row;
  at::Tensor param, grad;
};

std::vector<Laid> lay_out(const HeldParams& held, Walk& found) {
  std::vector<Laid> all;
  for (const auto& [list, place] : found.noncontiguous) {
    ParamRef& ref = found.params[list][place];
    const HeldParams::Held& h = held[ref.row];
    Laid l = {ref.row, h.param, found.grads.tensors[ref.row]};
    const at::Tensor& like = layout_of(h);
    at::Tensor dense = like;
    if (!like.is_non_overlapping_and_dense()) dense = at::empty(like.sizes(), like.options());
    if (!same_strides(l.param, dense)) l.param = dense_copy(l.param, dense.strides());
    if (!same_strides(l.grad, dense) || l.grad.is_neg() || l.grad.is_conj())
      l.grad = dense_copy(l.grad.resolve_conj().resolve_neg(), dense.strides());
    ref = ref_of(h, l.param, l.grad, ref.row, true);
    all.push_back(std::move(l));
  }
  return all;
}

// Learning rates that are tensors, where the kernels read them: numbers on the host, else addresses
// into what comes back.
std::vector<at::Tensor> read_lrs(const std::vector<MaybeTensor>& values, at::Device device,
                                 std::vector<GroupOptions>& groups) {
  std::vector<at::Tensor> lrs;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (!values[g]) continue;
    lrs.push_back(converted(values[g]->to(device), at::kFloat));
    const float* const lr = lrs.back().const_data_ptr<float>();
    if (is_host(device))
      groups[g].lr = *lr;
    else
      groups[g].lr_value = lr;
  }
  return lrs;
}

// Updates the parameters of one device.
void update_on(at::Device device, Rule rule, std::vector<ParamRef> params, const StepCall& call,
               const Use& use) {
  const Use here = use.on(device);
  OptimStep step = {rule,
                    std::move(params),
                    call.groups,
                    here.in_memory(call.bound),
                    call.update_clip,
                    call.stochastic_rounding};
  const std::vector<at::Tensor> lrs = read_lrs(call.lr_values, device, step.groups);
  run_on(
      device, [&] { cpu::optim_step(step); },
      [&](Stream stream) {
        const at::Tensor scratch = scratch_on(device, cuda::optim_scratch_bytes(step));
        cuda::optim_step(step, scratch.mutable_data_ptr(), stream);
      });
}

void apply(const HeldParams& held, Walk& found, const StepCall& call, const Use& given) {
  const bool writes_grads = call.materialize && given.plan;
  const Use use = writes_grads ? materialize(held, found, given) : given;
  for (const std::vector<ParamRef>& params : found.params) bump_versions(held, params);
  const std::vector<Laid> laid = lay_out(held, found);
  for (size_t list = 0; list < found.params.size(); ++list)
    update_on(found.grads.groups[list].device, held.rule(), std::move(found.params[list]), call,
              use);
  for (const Laid& l : laid)
    if (!l.param.is_same(held[l.row].param)) held[l.row].param.copy_(l.param);
}

}  // namespace

ClipResult measure(const HeldParams& held, const MeasureCall& call) {
  return measure_gradients(held.op(), check_gradients(held.op(), held.gradients(), false),
                           call.max_norm, norm_spec(2.0), call.nonfinite, call.scale);
}

ClipResult step(const HeldParams& held, const MeasureCall& measurement, const StepCall& call) {
  Walk found = walk(held);
  const ClipResult result =
      measure_gradients(held.op(), found.grads, measurement.max_norm, norm_spec(2.0),
                        measurement.nonfinite, measurement.scale);
  apply(held, found, call, {result.plan, std::nullopt});
  return result;
}

void update(const HeldParams& held, const StepCall& call, const MaybeTensor& plan,
            const MaybeTensor& coefficients) {
  Walk found = walk(held);
  apply(held, found, call, {plan, coefficients});
}

}  // namespace gradfuse
