#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gradfuse::cpu {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");  // and F16C, which every AVX2 machine has
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa named(const std::string& name) {
  if (name.empty()) return has_avx512() ? Isa::Avx512 : has_avx2() ? Isa::Avx2 : Isa::Baseline;
  if (name == "baseline") return Isa::Baseline;
  if (name != "avx2" && name != "avx512")
    throw std::invalid_argument("GRADFUSE_ISA: expected baseline, avx2 or avx512, got " + name);
  if (name == "avx2" ? !has_avx2() : !has_avx512())
    throw std::invalid_argument("GRADFUSE_ISA: this machine does not run " + name);
  return name == "avx2" ? Isa::Avx2 : Isa::Avx512;
}

Isa from_environment() {
  const char* const name = std::getenv("GRADFUSE_ISA");
  return named(name ? name : "");
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> set = from_environment();
  return set;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* isa_name() {
  switch (isa()) {
    case Isa::Avx512: return "avx512";
    case Isa::Avx2: return "avx2";
    default: return "baseline";
  }
}

void set_isa(const char* name) { chosen().store(named(name), std::memory_order_relaxed); }

}  // namespace gradfuse::cpu
