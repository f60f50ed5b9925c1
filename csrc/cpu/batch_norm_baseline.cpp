// The batch norm kernels for baseline, as batch_norm_kernels.h defines them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../math/batch_norm.h"
#include "kernels.h"

#define GRADFUSE_VEC_BYTES 16

namespace gradfuse::cpu {
namespace {
#include "batch_norm_kernels.h"
}  // namespace

const BatchNormKernels kBatchNormBaseline = {forward_sums, forward_apply, backward_sums,
                                             backward_apply};

}  // namespace gradfuse::cpu
