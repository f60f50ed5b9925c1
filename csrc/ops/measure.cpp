#include "measure.h"

#include <ATen/ops/empty.h>

#include "../tensor/checks.h"
#include "../tensor/dispatch.h"

namespace gradfuse {
namespace {

// Allocates the results; `empty` is at::empty or empty_on_device.
template <class Empty>
ClipResult make_result(const GradList& grads, at::Device device, Empty empty) {
  const auto wide = at::TensorOptions().dtype(at::kDouble).device(device);
  ClipResult r;
  r.norm = empty({}, wide.dtype(grads.any_double ? at::kDouble : at::kFloat));
  r.plan = empty({kPlanFields}, wide);
  r.stats = empty({static_cast<int64_t>(grads.tensors.size()), kStatsFields}, wide);
  return r;
}
ClipResult make_device_result(const GradList& grads, at::Device device) {
  return make_result(grads, device, empty_on_device);
}

TensorStats* stats_in(const at::Tensor& t) {
  return reinterpret_cast<TensorStats*>(t.mutable_data_ptr<double>());
}

// On the host, with the rows of absent gradients filled in.
ClipResult make_host_result(const GradList& grads) {
  const ClipResult r = make_result(
      grads, at::kCPU,
      [](at::IntArrayRef sizes, at::TensorOptions options) { return at::empty(sizes, options); });
  for (size_t i = 0; i < grads.tensors.size(); ++i)
    if (!grads.tensors[i].defined()) stats_in(r.stats)[i] = absent_stats();
  return r;
}

// Settings of a measurement.
struct Measurement {
  double max_norm;
  NormSpec spec;
  NonFinite nonfinite;
  const LossScaleTensors& scale;
};

void write_norm(const at::Tensor& norm, double value) {
  if (norm.scalar_type() == at::kDouble)
    *norm.mutable_data_ptr<double>() = value;
  else
    *norm.mutable_data_ptr<float>() = static_cast<float>(value);
}

// Raises if the plan's action is Refuse. On CUDA this waits for the device.
void check_refused(const char* op, const at::Tensor& plan, const Measurement& m) {
  if (m.nonfinite != NonFinite::Error) return;
  const at::Tensor host = on_host(plan);
  if (plan_in(host)->action() == Action::Refuse)
    fail<std::runtime_error>(
        op, ": expected a finite total norm of order ", m.spec.p, ", got ", plan_in(host)->norm,
        "; nothing was written (nonfinite=\"propagate\" or \"zero\" would go on; a "
        "GradReport names the layer)");
}

// Measures the gradients of one CUDA device; everything stays there.
void measure_on_cuda(const DeviceGroup& group, const Measurement& m, const ClipResult& out) {
  const MaybeTensor value = number_on(group.device, m.scale.scale);
  const MaybeTensor found_inf = number_on(group.device, m.scale.found_inf);
  const auto data = [](const MaybeTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  const NormCall call = {m.spec,
                         m.max_norm,
                         m.nonfinite,
                         data(value),
                         data(found_inf),
                         stats_in(out.stats),
                         out.stats.size(0),
                         mutable_plan_in(out.plan),
                         out.norm.mutable_data_ptr(),
                         out.norm.scalar_type() == at::kDouble};
  run_on(
      group.device, [] {},
      [&](Stream stream) {
        const at::Tensor scratch = scratch_on(group.device, cuda::stats_scratch_bytes(group.refs));
        cuda::stats(group.refs, group.rows, call, scratch.mutable_data_ptr(), stream);
      });
}

// Norm, plan and statistics from a sum on the host.
void write_result(const ClipResult& host, ScaledSum sum, const Measurement& m) {
  LossScale scale = {scale_on_host(m.scale.scale), false};
  if (m.scale.found_inf)
    scale.found_inf =
        *on_host(converted(*m.scale.found_inf, at::kDouble)).const_data_ptr<double>() != 0.0;
  const ClipPlan plan = unscaled_plan(sum, m.spec, m.max_norm, m.nonfinite, scale);
  *mutable_plan_in(host.plan) = plan;
  write_norm(host.norm, plan.norm);
  if (!m.scale.scale) return;
  for (int64_t row = 0; row < host.stats.size(0); ++row)
    unscale(stats_in(host.stats)[row], scale.value);
}

// The sum over one group, and its rows of the statistics, on the host.
ScaledSum sum_on_host(const GradList& grads, const DeviceGroup& group, const Measurement& m,
                      const ClipResult& host) {
  if (is_host(group.device))
    return sum_of(cpu::stats(group.refs, group.rows, m.spec, stats_in(host.stats)), m.spec);
  const ClipResult part = make_device_result(grads, group.device);
  const LossScaleTensors unscaled;  // the host takes the scale off the total
  measure_on_cuda(group, {m.max_norm, m.spec, m.nonfinite, unscaled}, part);
  const at::Tensor plan = on_host(part.plan), stats = on_host(part.stats);
  for (int64_t row : group.rows) stats_in(host.stats)[row] = stats_in(stats)[row];
  return plan_in(plan)->sum;
}

// Measures gradients on the host or on several devices: copies each group's sum to the host and
// combines them there. This waits for every CUDA device.
ClipResult measure_on_host(const GradList& grads, const Measurement& m) {
  ClipResult host = make_host_result(grads);
  ScaledSum total = {};
  if (grads.groups.size() == 1) total = sum_on_host(grads, grads.groups[0], m, host);
  if (grads.groups.size() > 1)
    for (const DeviceGroup& group : grads.groups)
      total = combine(total, sum_on_host(grads, group, m, host), m.spec);
  write_result(host, total, m);
  if (grads.groups.size() < 2) return host;
  const at::Device first = grads.groups.front().device;
  return {host.norm.to(first), host.plan.to(first), host.stats.to(first)};
}

}  // namespace

NonFinite nonfinite_of(int code) {
  constexpr int kMost = static_cast<int>(NonFinite::Skip);
  if (code < 0 || code > kMost)
    fail<std::invalid_argument>("nonfinite: expected 0 to ", kMost, ", got ", code);
  return static_cast<NonFinite>(code);
}

const ClipPlan* plan_in(const at::Tensor& t) {
  return reinterpret_cast<const ClipPlan*>(t.const_data_ptr<double>());
}
ClipPlan* mutable_plan_in(const at::Tensor& t) {
  return reinterpret_cast<ClipPlan*>(t.mutable_data_ptr<double>());
}

double scale_on_host(const MaybeTensor& scale) {
  return scale ? *on_host(converted(*scale, at::kDouble)).const_data_ptr<double>() : 1.0;
}

MaybeTensor number_on(at::Device device, const MaybeTensor& t) {
  return t ? MaybeTensor(converted(t->to(device), at::kFloat)) : MaybeTensor();
}

ClipResult measure_gradients(const char* op, const GradList& grads, double max_norm, NormSpec spec,
                             NonFinite nonfinite, const LossScaleTensors& scale) {
  const Measurement m = {max_norm, spec, nonfinite, scale};
  ClipResult result;
  if (grads.groups.size() == 1 && !is_host(grads.groups[0].device)) {
    result = make_device_result(grads, grads.groups[0].device);
    measure_on_cuda(grads.groups[0], m, result);
  } else {
    result = measure_on_host(grads, m);
  }
  for (const auto& [row, first] : grads.repeats)
    result.stats.select(0, static_cast<int64_t>(row))
        .copy_(result.stats.select(0, static_cast<int64_t>(first)));
  check_refused(op, result.plan, m);
  return result;
}

std::pair<at::Tensor, at::Tensor> plan_of_rank_sums(const char* op, const at::Tensor& sums,
                                                    bool wide, double max_norm, NormSpec spec,
                                                    NonFinite nonfinite, const MaybeTensor& scale) {
  const at::Tensor dense = sums.contiguous();
  const auto* const rows = reinterpret_cast<const RankSum*>(dense.const_data_ptr<double>());
  const at::TensorOptions options = dense.options();
  const at::Tensor norm = empty_on_device({}, options.dtype(wide ? at::kDouble : at::kFloat));
  const at::Tensor plan = empty_on_device({kPlanFields}, options);
  run_on(
      dense.device(),
      [&] {
        *mutable_plan_in(plan) =
            plan_of_sums(rows, dense.size(0), spec, max_norm, nonfinite, scale_on_host(scale));
        write_norm(norm, plan_in(plan)->norm);
      },
      [&](Stream stream) {
        const MaybeTensor value = number_on(dense.device(), scale);
        const NormCall call = {spec,
                               max_norm,
                               nonfinite,
                               value ? value->const_data_ptr<float>() : nullptr,
                               nullptr,
                               nullptr,
                               0,
                               mutable_plan_in(plan),
                               norm.mutable_data_ptr(),
                               wide};
        cuda::plan_of_sums(rows, dense.size(0), call, stream);
      });
  const LossScaleTensors none;
  check_refused(op, plan, {max_norm, spec, nonfinite, none});
  return {norm, plan};
}

void apply_plan(GradList& grads, const at::Tensor& plan, const MaybeTensor& coefficients) {
  bool any_cpu = is_host(plan.device());
  for (const DeviceGroup& group : grads.groups) any_cpu |= is_host(group.device);
  at::Tensor host, each;
  if (any_cpu) {
    host = on_host(plan);
    if (plan_in(host)->is_refused()) return;
    if (plan_in(host)->action() == Action::Keep && !coefficients &&
        plan_in(host)->factor.value == 1.0)
      return;
    if (coefficients) each = on_host(*coefficients);
  }
  grads.prepare_write();
  const auto on_cpu = [&](const DeviceGroup& group) {
    const ClipPlan& p = *plan_in(host);
    if (p.action() == Action::Zero)
      cpu::zero(group.refs);
    else if (coefficients)
      cpu::scale_each(group.refs, group.rows, p.factor, each.const_data_ptr<double>());
    else
      cpu::scale(group.refs, p.factor);
  };
  const auto on_cuda = [&](const DeviceGroup& group, Stream stream) {
    const at::Tensor here = plan.to(group.device);
    const at::Tensor rows = coefficients ? coefficients->to(group.device) : at::Tensor();
    cuda::apply(group.refs, group.rows, plan_in(here),
                coefficients ? rows.const_data_ptr<double>() : nullptr, stream);
  };
  for (const DeviceGroup& group : grads.groups)
    run_on(group.device, [&] { on_cpu(group); }, [&](Stream stream) { on_cuda(group, stream); });
}

}  // namespace gradfuse
