// The optimizer kernels for baseline, as optim_kernels.h defines them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define GRADFUSE_VEC_BYTES 16

namespace gradfuse::cpu {
namespace {
#include "optim_kernels.h"
}  // namespace

const OptimKernels kOptimBaseline = {adamw, sgd, adamw_ratio_sum};

}  // namespace gradfuse::cpu
