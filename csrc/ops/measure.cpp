#include "measure.h"

#include <ATen/ops/empty.h>

#include <algorithm>

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

CudaCall call_for(const ClipResult& out, const Measurement& m) {
  CudaCall made(out.norm, out.plan, m);
  made.call.stats = stats_in(out.stats);
  made.call.rows = out.stats.size(0);
  return made;
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

// The limbs and the statistics of the gradients of one CUDA device; everything stays there.
at::Tensor limbs_on_cuda(const DeviceGroup& group, LimbForm form, const CudaCall& out) {
  const at::Tensor words =
      empty_on_device({form.words()}, at::TensorOptions().dtype(at::kLong).device(group.device));
  run_on(
      group.device, [] {},
      [&](Stream stream) {
        const at::Tensor scratch = scratch_on(group.device, cuda::stats_scratch_bytes(group.refs));
        cuda::exact_limbs(group.refs, group.rows, form, words.mutable_data_ptr<int64_t>(), out.call,
                          scratch.mutable_data_ptr(), stream);
      });
  return words;
}

// Measures the gradients of one CUDA device; everything stays there.
void measure_on_cuda(const DeviceGroup& group, LimbForm form, const Measurement& m,
                     const ClipResult& out) {
  const CudaCall given = call_for(out, m);
  const at::Tensor words = m.exact ? limbs_on_cuda(group, form, given) : at::Tensor();
  run_on(
      group.device, [] {},
      [&](Stream stream) {
        if (m.exact)
          return cuda::exact_plan(words.const_data_ptr<int64_t>(), form, given.call, stream);
        const at::Tensor scratch = scratch_on(group.device, cuda::stats_scratch_bytes(group.refs));
        cuda::stats(group.refs, group.rows, given.call, scratch.mutable_data_ptr(), stream);
      });
}

// Adds the sum over one group, and writes its rows of the statistics, on the host.
void add_on_host(const GradList& grads, const DeviceGroup& group, LimbForm form,
                 const Measurement& m, const ClipResult& host, HostSum& total) {
  int64_t words[kMostWords];
  if (is_host(group.device)) {
    if (m.exact) {
      cpu::exact_limbs(group.refs, group.rows, form, words, stats_in(host.stats));
      return add_words(total.words, words, form);
    }
    const Stats s = cpu::stats(group.refs, group.rows, m.spec, stats_in(host.stats));
    total.sum = combine(total.sum, sum_of(s, m.spec), m.spec);
    return;
  }
  const ClipResult part = make_device_result(grads, group.device);
  // The host takes the scale off the total.
  const Measurement unscaled = {m.max_norm, m.spec, m.nonfinite, m.exact};
  if (m.exact) {
    const at::Tensor limbs = on_host(limbs_on_cuda(group, form, call_for(part, unscaled)));
    add_words(total.words, limbs.const_data_ptr<int64_t>(), form);
  } else {
    measure_on_cuda(group, form, unscaled, part);
    total.sum = combine(total.sum, plan_in(on_host(part.plan))->sum, m.spec);
  }
  const at::Tensor stats = on_host(part.stats);
  for (int64_t row : group.rows) stats_in(host.stats)[row] = stats_in(stats)[row];
}

// Measures gradients on the host or on several devices: copies each group's sum to the host and
// combines them there. This waits for every CUDA device.
ClipResult measure_on_host(const GradList& grads, LimbForm form, const Measurement& m) {
  ClipResult host = make_host_result(grads);
  HostSum total;
  for (const DeviceGroup& group : grads.groups) add_on_host(grads, group, form, m, host, total);
  const LossScale scale = loss_scale(m.scale);
  write_plan(host.norm, host.plan, total, form, m, scale);
  if (m.scale.scale)
    for (int64_t row = 0; row < host.stats.size(0); ++row)
      unscale(stats_in(host.stats)[row], scale.value);
  if (grads.groups.size() < 2) return host;
  const at::Device first = grads.groups.front().device;
  return {host.norm.to(first), host.plan.to(first), host.stats.to(first)};
}

bool is_on_one_gpu(const GradList& grads) {
  return grads.groups.size() == 1 && !is_host(grads.groups[0].device);
}

// The rows of gradients that are given again.
void repeat_rows(const GradList& grads, const at::Tensor& stats) {
  for (const auto& [row, first] : grads.repeats)
    stats.select(0, static_cast<int64_t>(row)).copy_(stats.select(0, static_cast<int64_t>(first)));
}

}  // namespace

ClipResult measure_gradients(const char* op, const GradList& grads, const Measurement& m) {
  const LimbForm form = grads.any_double ? kWideLimbs : kNarrowLimbs;
  ClipResult result;
  if (is_on_one_gpu(grads)) {
    result = make_device_result(grads, grads.groups[0].device);
    measure_on_cuda(grads.groups[0], form, m, result);
  } else {
    result = measure_on_host(grads, form, m);
  }
  repeat_rows(grads, result.stats);
  check_refused(op, result.plan, m);
  return result;
}

std::pair<at::Tensor, at::Tensor> exact_limbs(const GradList& grads) {
  const LimbForm form = grads.any_double ? kWideLimbs : kNarrowLimbs;
  const Measurement m = {INFINITY, norm_spec(2.0), NonFinite::Propagate, true};
  at::Tensor limbs, stats;
  if (is_on_one_gpu(grads)) {
    const ClipResult result = make_device_result(grads, grads.groups[0].device);
    limbs = limbs_on_cuda(grads.groups[0], form, call_for(result, m));
    stats = result.stats;
  } else {
    const ClipResult host = make_host_result(grads);
    HostSum total;
    for (const DeviceGroup& group : grads.groups) add_on_host(grads, group, form, m, host, total);
    carry(total.words, form);
    limbs = at::empty({form.words()}, at::kLong);
    std::copy_n(total.words, form.words(), limbs.mutable_data_ptr<int64_t>());
    stats = host.stats;
    if (grads.groups.size() > 1) {
      const at::Device first = grads.groups.front().device;
      limbs = limbs.to(first);
      stats = stats.to(first);
    }
  }
  repeat_rows(grads, stats);
  return {limbs, stats};
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
