// The emulated build has no CPU kernels: all its tensors are on the device.
#include <stdexcept>

#include "ops.h"

namespace gradfuse::cpu {

[[noreturn]] static void refuse() { throw std::logic_error("no CPU kernels in this build"); }

Stats stats(const std::vector<GradRef>&, const std::vector<int64_t>&, NormSpec, double*) {
  refuse();
}
void scale(const std::vector<GradRef>&, ScaledNorm) { refuse(); }
void scale_each(const std::vector<GradRef>&, const std::vector<int64_t>&, ScaledNorm,
                const double*) {
  refuse();
}
void optim_step(const OptimStep&) { refuse(); }
void zero(const std::vector<GradRef>&) { refuse(); }
void clamp(const std::vector<GradRef>&, double) { refuse(); }
void clip_units(const std::vector<UnitRef>&, double, double, NormSpec) { refuse(); }
void batch_norm_forward(const BatchNormForward&) { refuse(); }
void batch_norm_backward(const BatchNormBackward&) { refuse(); }
const char* isa() { return "none"; }

}  // namespace gradfuse::cpu
