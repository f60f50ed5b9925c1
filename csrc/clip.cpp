#include "clip.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "checks.h"
#include "device.h"
#include "dispatch.h"

namespace gradfuse {
namespace {

// Room for the results; `empty` is at::empty or empty_on_device.
template <class Empty>
ClipResult make_result(const GradList& grads, at::Device device, Empty empty) {
  const auto wide = at::TensorOptions().dtype(at::kDouble).device(device);
  ClipResult r;
  r.norm = empty({}, wide.dtype(grads.any_double ? at::kDouble : at::kFloat));
  r.totals = empty({kTotals}, wide);
  r.table = empty({static_cast<int64_t>(grads.tensors.size()), kTableColumns}, wide);
  return r;
}

ClipResult make_host_result(const GradList& grads) {
  return make_result(grads, at::kCPU, [](at::IntArrayRef sizes, at::TensorOptions options) {
    return at::empty(sizes, options);
  });
}

void write_norm(const at::Tensor& norm, double value) {
  if (norm.scalar_type() == at::kDouble)
    *norm.mutable_data_ptr<double>() = value;
  else
    *norm.mutable_data_ptr<float>() = static_cast<float>(value);
}

// Raises if the plan is to refuse. On CUDA this waits for the device.
void check_refused(const char* op, const ClipResult& result, NormSpec spec, NonFinite policy) {
  if (policy != NonFinite::Error) return;
  const at::Tensor totals = on_host(result.totals);
  const double* t = totals.const_data_ptr<double>();
  if (t[3] == static_cast<double>(Action::Refuse))
    fail<std::runtime_error>(
        op, ": expected a finite total norm of order ", spec.p, ", got ", t[0],
        "; nothing was written (nonfinite=\"propagate\" or \"zero\" would go on; a "
        "GradReport names the layer)");
}

// Rows without a gradient: zeros, and -1 elements.
void mark_absent(const GradList& grads, double* table) {
  for (size_t i = 0; i < grads.tensors.size(); ++i)
    if (!grads.tensors[i].defined()) write_table_row(Stats{}, -1.0, table + i * kTableColumns);
}

#if defined(GRADFUSE_CUDA)
at::Tensor device_bytes(int64_t bytes, at::Device device) {
  return empty_on_device({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

// A float32 number where kernels read it.
MaybeTensor number_on(at::Device device, const MaybeTensor& t) {
  return t ? MaybeTensor(converted(t->to(device), at::kFloat)) : MaybeTensor();
}

// Stats of one CUDA group: totals for (max_norm, policy) and table rows, all on the device.
void cuda_stats(const DeviceGroup& group, NormSpec spec, double max_norm, NonFinite policy,
                const LossScaleTensors& scale, const ClipResult& out) {
  const MaybeTensor value = number_on(group.device, scale.scale);
  const MaybeTensor found_inf = number_on(group.device, scale.found_inf);
  on_device(group.device, [&](cudaStream_t stream) {
    const at::Tensor scratch = device_bytes(cuda::stats_scratch_bytes(group.refs), group.device);
    cuda::stats(group.refs, group.rows, out.table.size(0), spec, max_norm, policy,
                scratch.mutable_data_ptr(), out.table.mutable_data_ptr<double>(),
                out.totals.mutable_data_ptr<double>(), out.norm.mutable_data_ptr(),
                out.norm.scalar_type() == at::kDouble,
                value ? value->const_data_ptr<float>() : nullptr,
                found_inf ? found_inf->const_data_ptr<float>() : nullptr, stream);
  });
}
#endif

// The scale as the host sees it. On CUDA this waits for the device.
LossScale scale_on_host(const LossScaleTensors& given) {
  LossScale scale = {1.0, false};
  const auto number = [](const at::Tensor& t) {
    return *on_host(converted(t, at::kDouble)).const_data_ptr<double>();
  };
  if (given.scale) scale.value = number(*given.scale);
  if (given.found_inf) scale.found_inf = number(*given.found_inf) != 0.0;
  return scale;
}

// Totals, norm and table of a sum that the host has.
void write_result(const ClipResult& host, ScaledSum sum, double max_norm, NormSpec spec,
                  NonFinite policy, const LossScaleTensors& given) {
  const LossScale scale = scale_on_host(given);
  const ClipPlan plan = unscaled_plan(norm_of(sum, spec), max_norm, policy, scale);
  write_totals(plan, sum, host.totals.mutable_data_ptr<double>());
  write_norm(host.norm, plan.norm);
  if (!given.scale) return;
  double* table = host.table.mutable_data_ptr<double>();
  for (int64_t row = 0; row < host.table.size(0); ++row)
    unscale_table_row(table + row * kTableColumns, scale.value);
}

// Gradients on several devices: each group's sum comes to the host, is combined there, and the plan
// goes back. This waits for every CUDA device.
ClipResult stats_on_all(const GradList& grads, double max_norm, NormSpec spec, NonFinite policy,
                        const LossScaleTensors& scale) {
  ClipResult host = make_host_result(grads);
  double* table = host.table.mutable_data_ptr<double>();
  mark_absent(grads, table);
  ScaledSum total = {};
  for (const DeviceGroup& group : grads.groups) {
    ScaledSum sum = {};
    if (is_host(group.device)) {
      sum = sum_of(cpu::stats(group.refs, group.rows, spec, table), spec);
    } else {
#if defined(GRADFUSE_CUDA)
      const ClipResult part = make_result(grads, group.device, empty_on_device);
      cuda_stats(group, spec, max_norm, policy, {}, part);
      const at::Tensor totals = on_host(part.totals);
      const at::Tensor rows = on_host(part.table);
      const double* t = totals.const_data_ptr<double>();
      sum = {t[4], t[5]};
      for (int64_t row : group.rows)
        std::copy_n(rows.const_data_ptr<double>() + row * kTableColumns, kTableColumns,
                    table + row * kTableColumns);
#endif
    }
    total = combine(total, sum, spec);
  }
  write_result(host, total, max_norm, spec, policy, scale);
  const at::Device first = grads.groups.front().device;
  return {host.norm.to(first), host.totals.to(first), host.table.to(first)};
}

ClipResult stats_with_plan(const GradList& grads, double max_norm, NormSpec spec, NonFinite policy,
                           const LossScaleTensors& scale) {
#if defined(GRADFUSE_CUDA)
  if (grads.groups.size() == 1 && !is_host(grads.groups[0].device)) {
    const ClipResult out = make_result(grads, grads.groups[0].device, empty_on_device);
    cuda_stats(grads.groups[0], spec, max_norm, policy, scale, out);
    return out;
  }
#endif
  if (grads.groups.size() > 1) return stats_on_all(grads, max_norm, spec, policy, scale);
  ClipResult out = make_host_result(grads);
  double* table = out.table.mutable_data_ptr<double>();
  mark_absent(grads, table);
  ScaledSum total = {};
  for (const DeviceGroup& group : grads.groups)
    total = sum_of(cpu::stats(group.refs, group.rows, spec, table), spec);
  write_result(out, total, max_norm, spec, policy, scale);
  return out;
}

// Does to every gradient what the totals say. CUDA groups read them on the device; only a CPU group
// makes the host wait for totals that lie on one.
void apply_plan(GradList& grads, const at::Tensor& totals, const MaybeTensor& coefficients) {
  bool any_cpu = is_host(totals.device());
  for (const DeviceGroup& group : grads.groups) any_cpu |= is_host(group.device);
  const at::Tensor host = any_cpu ? on_host(totals) : at::Tensor();
  const double* t = any_cpu ? host.const_data_ptr<double>() : nullptr;
  const Action action = any_cpu ? static_cast<Action>(static_cast<int>(t[3])) : Action::Scale;
  if (action == Action::Refuse || action == Action::Skip) return;
  if (action == Action::Keep && !coefficients && t[6] == 1.0) return;
  const at::Tensor each = any_cpu && coefficients ? on_host(*coefficients) : at::Tensor();
  grads.prepare_write();
  for (const DeviceGroup& group : grads.groups) {
    if (is_host(group.device)) {
      if (action == Action::Zero)
        cpu::zero(group.refs);
      else if (coefficients)
        cpu::scale_each(group.refs, group.rows, {t[6], t[7]}, each.const_data_ptr<double>());
      else
        cpu::scale(group.refs, {t[6], t[7]});
    } else {
#if defined(GRADFUSE_CUDA)
      const at::Tensor here = totals.to(group.device);
      MaybeTensor rows;
      if (coefficients) rows = coefficients->to(group.device);
      on_device(group.device, [&](cudaStream_t stream) {
        cuda::apply(group.refs, here.const_data_ptr<double>(),
                    rows ? rows->const_data_ptr<double>() : nullptr, group.rows, stream);
      });
#endif
    }
  }
}

// The plan for a given norm, on the norm's device.
at::Tensor totals_for(const at::Tensor& total_norm, double max_norm) {
  const at::Tensor norm = converted(total_norm, at::kDouble);
  const at::Tensor totals = empty_on_device({kTotals}, norm.options());
#if defined(GRADFUSE_CUDA)
  if (!is_host(norm.device())) {
    on_device(norm.device(), [&](cudaStream_t stream) {
      cuda::plan(norm.const_data_ptr<double>(), max_norm, totals.mutable_data_ptr<double>(),
                 stream);
    });
    return totals;
  }
#endif
  const double value = *norm.const_data_ptr<double>();
  write_totals(clip_plan({value, 0}, max_norm, NonFinite::Propagate), {value, 0},
               totals.mutable_data_ptr<double>());
  return totals;
}

}  // namespace

ClipResult grad_stats(const char* op, const GradList& grads, NormSpec spec, NonFinite policy) {
  const ClipResult result = stats_with_plan(grads, INFINITY, spec, policy, {});
  check_refused(op, result, spec, policy);
  return result;
}

ClipResult clip_by_norm(const char* op, GradList& grads, double max_norm, NormSpec spec,
                        NonFinite policy) {
  const ClipResult result = plan_step(op, grads, max_norm, spec, policy, {});
  apply_plan(grads, result.totals, {});
  return result;
}

ClipResult plan_step(const char* op, const GradList& grads, double max_norm, NormSpec spec,
                     NonFinite policy, const LossScaleTensors& scale) {
  const ClipResult result = stats_with_plan(grads, max_norm, spec, policy, scale);
  check_refused(op, result, spec, policy);
  return result;
}

void apply_totals(GradList& grads, const at::Tensor& totals, const MaybeTensor& coefficients) {
  apply_plan(grads, totals, coefficients);
}

void scale_by_norm(GradList& grads, double max_norm, const at::Tensor& total_norm) {
  if (total_norm.numel() != 1 || !device_is_supported(total_norm.device().type()) ||
      total_norm.is_complex())
    fail<std::invalid_argument>("clip_grads_with_norm_: total_norm must be one real number, got ",
                                total_norm.sizes(), " of ", total_norm.scalar_type(), " on ",
                                total_norm.device());
  apply_plan(grads, totals_for(total_norm, max_norm), {});
}

void clip_by_value(GradList& grads, double clip_value) {
  grads.prepare_write();
  for (const DeviceGroup& group : grads.groups) {
    if (is_host(group.device)) {
      cpu::clamp(group.refs, clip_value);
    } else {
#if defined(GRADFUSE_CUDA)
      on_device(group.device,
                [&](cudaStream_t stream) { cuda::clamp(group.refs, clip_value, stream); });
#endif
    }
  }
}

void clip_adaptively(UnitList& params, double clip_factor, double eps, NormSpec spec,
                     const MaybeTensor& scale) {
  params.grads.prepare_write();
  for (size_t i = 0; i < params.grads.groups.size(); ++i) {
    const std::vector<UnitRef> units = params.refs(i);
    if (is_host(params.grads.groups[i].device)) {
      cpu::clip_units(units, clip_factor * scale_on_host({scale, {}}).value, eps, spec);
    } else {
#if defined(GRADFUSE_CUDA)
      const at::Device device = params.grads.groups[i].device;
      const MaybeTensor here = number_on(device, scale);
      on_device(device, [&](cudaStream_t stream) {
        cuda::clip_units(units, clip_factor, eps, here ? here->const_data_ptr<float>() : nullptr,
                         spec, stream);
      });
#endif
    }
  }
}

}  // namespace gradfuse
