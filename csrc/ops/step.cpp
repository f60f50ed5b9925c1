#include "step.h"

#include <ATen/ops/zeros.h>

#include <array>

#include "../tensor/dispatch.h"
#include "../tensor/version.h"
#include "waiting.h"
#include "walk.h"

namespace gradfuse {
namespace {

// A GradientUse as tensors, which may still be on another device, and factors of the parameters'
// learning rates.
struct Use {
  MaybeTensor plan, coefficients;
  bool applied = false;  // to the gradients
  MaybeTensor lr_scales;

  Use on(at::Device device) const {
    const auto there = [&](const MaybeTensor& t) {
      if (!t) return MaybeTensor();
      return MaybeTensor(is_host(device) ? on_host(*t) : t->to(device));
    };
    return {there(plan), there(coefficients), applied, there(lr_scales)};
  }
  GradientUse in_memory(double bound) const {
    return {plan ? plan_in(*plan) : nullptr,
            coefficients ? coefficients->const_data_ptr<double>() : nullptr, bound, applied};
  }
};

// Applies the plan to the gradients.
void materialize(const HeldParams& held, Walk& found, const Use& use) {
  GradList grads = check_gradients(held.op(), found.grads.tensors, Access::Write);
  grads.sparse = found.grads.sparse;
  apply_plan(grads, *use.plan, use.coefficients);
  for (std::vector<ParamRef>& params : found.params)  // writing may have moved them
    for (ParamRef& r : params) r.grad = found.grads.tensors[r.row].const_data_ptr();
}

// A parameter and its gradient in the layout of the update: dense copies where they have gaps, the
// rows that a sparse gradient has.
struct Laid {
  int32_t row;
  at::Tensor param, grad;
  at::Tensor rows;  // [n] of the parameter; undefined for all of it

  // Copies the updated values back.
  void write_back(const at::Tensor& target) const {
    if (rows.defined())
      target.index_copy_(0, rows, param);
    else if (!param.is_same(target))
      target.copy_(param);
  }
};

// Whether an update by a sparse gradient changes nothing but the rows that it has.
bool updates_rows_only(const HeldParams::Held& h, const StepCall& call) {
  for (Slot slot : {kExpAvg, kMasterParam})
    if (h.tensors[slot].defined()) return false;
  return h.grad().sparse_dim() == 1 && call.groups[h.group].sgd.weight_decay == 0.0;
}

// `values` is the gradient, or the values of a sparse one.
Laid laid_out(const HeldParams::Held& h, int32_t row, const at::Tensor& values,
              const StepCall& call) {
  Laid l = {row, h.param(), values, {}};
  if (h.grad().is_sparse()) {
    if (updates_rows_only(h, call)) {
      l.rows = h.grad()._indices().select(0, 0);
      l.param = h.param().index_select(0, l.rows).contiguous();
      l.grad = values.contiguous();
      return l;
    }
    l.grad = h.grad().to_dense();
  }
  const at::Tensor& like = layout_of(h);
  at::Tensor dense = like;
  if (!like.is_non_overlapping_and_dense()) dense = at::empty(like.sizes(), like.options());
  if (!same_strides(l.param, dense)) l.param = dense_copy(l.param, dense.strides());
  if (!same_strides(l.grad, dense) || l.grad.is_neg() || l.grad.is_conj())
    l.grad = dense_copy(l.grad.resolve_conj().resolve_neg(), dense.strides());
  return l;
}

// Lays out the parameters of a layer that need it.
std::vector<Laid> lay_out(const HeldParams& held, Walk& found, int layer, const StepCall& call) {
  std::vector<Laid> all;
  for (const auto& [list, place] : found.noncontiguous) {
    ParamRef& ref = found.params[list][place];
    const HeldParams::Held& h = held[ref.row];
    if (h.layer != layer) continue;
    all.push_back(laid_out(h, ref.row, found.grads.tensors[ref.row], call));
    ref = ref_of(h, all.back().param, all.back().grad, ref.row, true);
  }
  return all;
}

// The parameters of a list that are in a layer.
std::vector<ParamRef> of_layer(const HeldParams& held, Walk& found, size_t list, int layer) {
  if (found.last_layer == 0) return std::move(found.params[list]);
  std::vector<ParamRef> out;
  for (const ParamRef& ref : found.params[list])
    if (held[ref.row].layer == layer) out.push_back(ref);
  return out;
}

// Sets learning rates that are tensors where the kernels read them: as numbers on the host, else as
// addresses into the returned tensors, which must stay alive.
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

// Updates the parameters of one device, or takes their sums of an LrScale.
void update_on(at::Device device, Rule rule, std::vector<ParamRef> params, const StepCall& call,
               const Use& use,
               double* lr_sums) {  // [parameters, 2] on the device, or null
  const Use here = use.on(device);
  const MaybeTensor scales = here.lr_scales;
  OptimStep step = {rule,          std::move(params),
                    call.groups,   here.in_memory(call.bound),
                    call.lr_scale, scales ? scales->const_data_ptr<double>() : nullptr,
                    lr_sums,       call.eps_follows_clip,
                    call.atan2,    call.stochastic_rounding};
  const std::vector<at::Tensor> lrs = read_lrs(call.lr_values, device, step.groups);
  run_on(
      device, [&] { cpu::optim_step(step); },
      [&](Stream stream) {
        const at::Tensor scratch = scratch_on(device, cuda::optim_scratch_bytes(step));
        cuda::optim_step(step, scratch.mutable_data_ptr(), stream);
      });
}

void apply(const HeldParams& held, Walk& found, const StepCall& call, const Use& given) {
  materialize_all("an optimizer's step");
  const bool writes_grads = call.materialize && given.plan;
  if (writes_grads) materialize(held, found, given);
  const Use use = {given.plan, given.coefficients, writes_grads, call.lr_scales};
  for (const std::vector<ParamRef>& params : found.params)
    bump_versions(params.size(), [&](size_t k, auto f) {
      const HeldParams::Held& h = held[params[k].row];
      f(h.param());
      for (const at::Tensor& t : h.tensors) f(t);
    });
  for (int layer = 0; layer <= found.last_layer; ++layer) {
    const std::vector<Laid> laid = lay_out(held, found, layer, call);
    for (size_t list = 0; list < found.params.size(); ++list) {
      std::vector<ParamRef> params = of_layer(held, found, list, layer);
      if (!params.empty())
        update_on(found.grads.groups[list].device, held.rule(), std::move(params), call, use,
                  nullptr);
    }
    for (const Laid& l : laid) l.write_back(held[l.row].param());
  }
}

}  // namespace

ClipResult measure(const HeldParams& held, const Measurement& m) {
  return measure_gradients(held.op(),
                           check_gradients(held.op(), held.gradients(), Access::ReadOnce), m);
}

ClipResult step(HeldParams& held, const Measurement& m, const StepCall& call) {
  Walk found = walk(held);
  const ClipResult result = measure_gradients(held.op(), found.grads, m);
  apply(held, found, call, {result.plan, std::nullopt, false, std::nullopt});
  return result;
}

void update(HeldParams& held, const StepCall& call, const MaybeTensor& plan,
            const MaybeTensor& coefficients) {
  Walk found = walk(held);
  apply(held, found, call, {plan, coefficients, false, std::nullopt});
}

void check_step(HeldParams& held) { walk(held); }

at::Tensor lr_sums(HeldParams& held, const StepCall& call, const MaybeTensor& plan,
                   const MaybeTensor& coefficients) {
  materialize_all("an optimizer's step");
  Walk found = walk(held);
  const Use use = {plan, coefficients, false, std::nullopt};
  const std::array<int64_t, 2> shape = {static_cast<int64_t>(held.size()), 2};
  at::Tensor total;
  for (int layer = 0; layer <= found.last_layer; ++layer) {
    const std::vector<Laid> laid = lay_out(held, found, layer, call);
    for (size_t list = 0; list < found.params.size(); ++list) {
      std::vector<ParamRef> params = of_layer(held, found, list, layer);
      if (params.empty()) continue;
      const at::Device device = found.grads.groups[list].device;
      const at::Tensor sums = empty_on_device(shape, at::TensorOptions(at::kDouble).device(device));
      sums.zero_();
      update_on(device, held.rule(), std::move(params), call, use, sums.mutable_data_ptr<double>());
      total = total.defined() ? total.add(sums.to(total.device())) : sums;
    }
  }
  return total.defined() ? total : at::zeros(shape, at::kDouble);
}

}  // namespace gradfuse
