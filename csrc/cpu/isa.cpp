#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gradfuse::cpu {
namespace {

struct InstructionSet {
  const ClipKernels& clip;
  const BatchNormKernels& batch_norm;
  const OptimKernels& optim;
};

InstructionSet choose() {
  const char* forced = std::getenv("GRADFUSE_ISA");
  const std::string name = forced ? forced : "";
  if (name == "baseline") return {kClipBaseline, kBatchNormBaseline, kOptimBaseline};
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") &&
                        __builtin_cpu_supports("fma");  // and F16C, which every AVX2 machine has
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (name.empty() || name == "avx512"))
    return {kClipAvx512, kBatchNormAvx512, kOptimAvx512};
  if (has_avx2 && (name.empty() || name == "avx2")) return {kClipAvx2, kBatchNormAvx2, kOptimAvx2};
#endif
  if (name.empty()) return {kClipBaseline, kBatchNormBaseline, kOptimBaseline};
  if (name == "avx2" || name == "avx512")
    throw std::invalid_argument("GRADFUSE_ISA: this machine does not run " + name);
  throw std::invalid_argument("GRADFUSE_ISA: expected baseline, avx2 or avx512, got " + name);
}

}  // namespace

static const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

const ClipKernels& clip_kernels() { return chosen().clip; }
const BatchNormKernels& batch_norm_kernels() { return chosen().batch_norm; }
const OptimKernels& optim_kernels() { return chosen().optim; }

}  // namespace gradfuse::cpu
