#include "parallel.h"

#include <pthread.h>

namespace gradfuse::cpu {
namespace {

bool g_forked = false;
[[maybe_unused]] const int g_fork_hook = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

}  // namespace

bool forked() { return g_forked; }

}  // namespace gradfuse::cpu
