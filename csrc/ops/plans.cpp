#include "plans.h"

#include <algorithm>

#include "../tensor/checks.h"
#include "../tensor/dispatch.h"

namespace gradfuse {
namespace {

// A norm and a plan.
std::pair<at::Tensor, at::Tensor> make_plan_on(at::Device device, bool wide) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
  return {empty_on_device({}, options.dtype(wide ? at::kDouble : at::kFloat)),
          empty_on_device({kPlanFields}, options)};
}

void write_norm(const at::Tensor& norm, double value) {
  if (norm.scalar_type() == at::kDouble)
    *norm.mutable_data_ptr<double>() = value;
  else
    *norm.mutable_data_ptr<float>() = static_cast<float>(value);
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

Measurement measurement_of(double max_norm, double norm_type, int nonfinite, bool exact) {
  if (exact && norm_type != 2.0)
    fail<std::invalid_argument>("norm_type must be 2 for an exact norm, got ", norm_type);
  return {max_norm, norm_spec(norm_type), nonfinite_of(nonfinite), exact};
}

LossScale loss_scale(const LossScaleTensors& given) {
  LossScale scale = {scale_on_host(given.scale), false};
  if (given.found_inf)
    scale.found_inf =
        *on_host(converted(*given.found_inf, at::kDouble)).const_data_ptr<double>() != 0.0;
  return scale;
}

void check_refused(const char* op, const at::Tensor& plan, const Measurement& m) {
  if (m.nonfinite != NonFinite::Error) return;
  const at::Tensor host = on_host(plan);
  if (plan_in(host)->action() == Action::Refuse)
    fail<std::runtime_error>(
        op, ": expected a finite total norm of order ", m.spec.p, ", got ", plan_in(host)->norm,
        "; nothing was written (nonfinite=\"propagate\" or \"zero\" would go on; a "
        "GradReport names the layer)");
}

CudaCall::CudaCall(const at::Tensor& norm, const at::Tensor& plan, const Measurement& m)
    : scale(number_on(plan.device(), m.scale.scale)),
      found_inf(number_on(plan.device(), m.scale.found_inf)) {
  const auto data = [](const MaybeTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  call = {m.spec,
          m.max_norm,
          m.nonfinite,
          data(scale),
          data(found_inf),
          nullptr,
          0,
          mutable_plan_in(plan),
          norm.mutable_data_ptr(),
          norm.scalar_type() == at::kDouble};
}

void write_plan(const at::Tensor& norm, const at::Tensor& plan, HostSum& total, LimbForm form,
                const Measurement& m, LossScale scale) {
  ClipPlan& p = *mutable_plan_in(plan);
  if (!m.exact) {
    p = unscaled_plan(total.sum, m.spec, m.max_norm, m.nonfinite, scale);
    return write_norm(norm, p.norm);
  }
  carry(total.words, form);
  p = plan_of_limbs(total.words, form, m.max_norm, m.nonfinite, scale);
  write_norm(norm, norm.scalar_type() == at::kDouble
                       ? p.norm
                       : float_norm(total.words, form, p, scale.value));
}

std::pair<at::Tensor, at::Tensor> plan_of_rank_sums(const char* op, const at::Tensor& sums,
                                                    bool wide, const Measurement& m) {
  const at::Tensor dense = sums.contiguous();
  const auto* const rows = reinterpret_cast<const RankSum*>(dense.const_data_ptr<double>());
  const auto [norm, plan] = make_plan_on(dense.device(), wide);
  run_on(
      dense.device(),
      [&, &norm = norm, &plan = plan] {
        *mutable_plan_in(plan) = plan_of_sums(rows, dense.size(0), m.spec, m.max_norm, m.nonfinite,
                                              scale_on_host(m.scale.scale));
        write_norm(norm, plan_in(plan)->norm);
      },
      [&, &norm = norm, &plan = plan](Stream stream) {
        cuda::plan_of_sums(rows, dense.size(0), CudaCall(norm, plan, m).call, stream);
      });
  check_refused(op, plan, m);
  return {norm, plan};
}

std::pair<at::Tensor, at::Tensor> plan_of_exact_limbs(const char* op, const at::Tensor& limbs,
                                                      bool wide, const Measurement& m) {
  const LimbForm form = limbs.numel() == kNarrowLimbs.words() ? kNarrowLimbs : kWideLimbs;
  if (limbs.dim() != 1 || limbs.numel() != form.words() || limbs.scalar_type() != at::kLong)
    fail<std::invalid_argument>(op, ": limbs must be int64 [", kNarrowLimbs.words(), "] or [",
                                kWideLimbs.words(), "], got ", limbs.scalar_type(), " ",
                                limbs.sizes());
  const at::Tensor dense = converted(limbs, at::kLong);
  const int64_t* const words = dense.const_data_ptr<int64_t>();
  const auto [norm, plan] = make_plan_on(dense.device(), wide);
  run_on(
      dense.device(),
      [&, &norm = norm, &plan = plan] {
        HostSum total;
        std::copy_n(words, form.words(), total.words);
        write_plan(norm, plan, total, form, m, loss_scale(m.scale));
      },
      [&, &norm = norm, &plan = plan](Stream stream) {
        cuda::exact_plan(words, form, CudaCall(norm, plan, m).call, stream);
      });
  check_refused(op, plan, m);
  return {norm, plan};
}

}  // namespace gradfuse
