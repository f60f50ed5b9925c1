// The clip kernels for baseline, as clip_kernels.h defines them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define GRADFUSE_VEC_BYTES 16

namespace gradfuse::cpu {
namespace {
#include "clip_kernels.h"
}  // namespace

const ClipKernels kClipBaseline = {"baseline", stats, scale, clamp};

}  // namespace gradfuse::cpu
