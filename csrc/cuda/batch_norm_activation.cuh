// The activations of batch norm on the device.
#pragma once

#include "../math/activation.h"
#include "common.cuh"

namespace gradfuse::cuda {

__device__ inline int32_t bits_of_float(float x) { return __float_as_int(x); }
__device__ inline float float_of_bits(int32_t bits) { return __int_as_float(bits); }

#include "../math/elementary.h"

__device__ inline float exponential(float x) { return exponential_float(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic_tangent(float x) { return hyperbolic_tangent_float(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float normal_cdf(float x) { return normal_cdf_float(x); }
__device__ inline double normal_cdf(double x) { return normcdf(x); }
__device__ inline float normal_density(float x) { return normal_density_float(x); }
__device__ inline double normal_density(double x) {
  return 0.39894228040143267794 * exp(-0.5 * x * x);
}

#include "../math/activation_functions.h"

}  // namespace gradfuse::cuda
