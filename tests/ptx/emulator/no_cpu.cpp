// The emulated build has no CPU kernels: all its tensors are on the device.
#include <stdexcept>

#include "cpu/caches.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops/adaptive_clip.h"
#include "ops/batch_norm.h"
#include "ops/clip.h"
#include "ops/optim.h"
#include "ops/row_norm.h"
#include "ops/stream.h"

namespace gradfuse::cpu {

[[noreturn]] static void refuse() { throw std::logic_error("no CPU kernels in this build"); }

Stats stats(const std::vector<GradRef>&, const std::vector<int64_t>&, NormSpec, TensorStats*) {
  refuse();
}
void exact_limbs(const std::vector<GradRef>&, const std::vector<int64_t>&, LimbForm, int64_t*,
                 TensorStats*) {
  refuse();
}
void scale(const std::vector<GradRef>&, ScaledNorm) { refuse(); }
void scale_each(const std::vector<GradRef>&, const std::vector<int64_t>&, ScaledNorm,
                const double*) {
  refuse();
}
void zero(const std::vector<GradRef>&) { refuse(); }
void clamp(const std::vector<GradRef>&, double) { refuse(); }
void adaptive_clip(const std::vector<UnitRef>&, UnitLimit, double) { refuse(); }
void batch_norm_forward(const BatchNormForward*, int64_t) { refuse(); }
void batch_norm_backward(const BatchNormBackward*, int64_t) { refuse(); }
void row_norm_forward(const RowNormForward&) { refuse(); }
void row_norm_backward(const RowNormBackward&) { refuse(); }
void optim_step(const OptimStep&) { refuse(); }
void stream(const StreamCall&) { refuse(); }
bool forked() { return false; }
const char* isa_name() { return "none"; }
void set_isa(const char*) { refuse(); }
void set_last_level_cache(int64_t) { refuse(); }

}  // namespace gradfuse::cpu
