// Plans from sums, of gradients measured here or on several ranks, on the host or a device.
// Torch-facing; needs no GIL.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "../tensor/storage.h"
#include "clip.h"

namespace gradfuse {

// Throws std::invalid_argument if the code is unknown.
NonFinite nonfinite_of(int code);

// The ClipPlan stored in a tensor.
const ClipPlan* plan_in(const at::Tensor& t);
ClipPlan* mutable_plan_in(const at::Tensor& t);

// What a loss scaler passes: each one float32 number, on any device.
struct LossScaleTensors {
  MaybeTensor scale;      // of the gradients
  MaybeTensor found_inf;  // not 0 if the step is to be skipped
};
double scale_on_host(const MaybeTensor& scale);  // 1 without one; on CUDA this waits for the device
// A float32 number where kernels of the device read it.
MaybeTensor number_on(at::Device device, const MaybeTensor& t);

// How gradients are measured.
struct Measurement {
  double max_norm;
  NormSpec spec;
  NonFinite nonfinite;
  bool exact = false;  // the norm is the correctly rounded root of the exact sum of squares
  LossScaleTensors scale = {};
};
// Throws std::invalid_argument if the code is unknown, or exact is set and norm_type is not 2.
Measurement measurement_of(double max_norm, double norm_type, int nonfinite, bool exact);

// The loss scaler's numbers on the host. On CUDA this waits for the device.
LossScale loss_scale(const LossScaleTensors& given);

// Throws std::runtime_error if the plan's action is Refuse under NonFinite::Error. On CUDA this
// waits for the device.
void check_refused(const char* op, const at::Tensor& plan, const Measurement& m);

// A call that writes a norm and a plan on their device, without statistics; and the numbers of a
// loss scaler there, which it points to.
struct CudaCall {
  MaybeTensor scale, found_inf;
  NormCall call;

  CudaCall(const at::Tensor& norm, const at::Tensor& plan, const Measurement& m);
};

// A sum on the host: in limbs if it is exact.
struct HostSum {
  ScaledSum sum = {};
  int64_t words[kMostWords] = {};
};

// Its norm and plan, on the host.
void write_plan(const at::Tensor& norm, const at::Tensor& plan, HostSum& total, LimbForm form,
                const Measurement& m, LossScale scale);

// Norm and plan for an exact sum, int64 [words] of either form, on its device; it may be that of up
// to 2^22 carried ones. Throws as plan_of_rank_sums, and std::invalid_argument if it has no form.
std::pair<at::Tensor, at::Tensor> plan_of_exact_limbs(const char* op, const at::Tensor& limbs,
                                                      bool wide, const Measurement& m);

// Norm and plan for the sums of several ranks, a RankSum each in a float64 tensor
// [ranks, kRankSumFields], on their device.
// Throws std::runtime_error if the norm is NaN or inf under NonFinite::Error; on CUDA this waits.
std::pair<at::Tensor, at::Tensor> plan_of_rank_sums(const char* op, const at::Tensor& sums,
                                                    bool wide, const Measurement& m);

}  // namespace gradfuse
