// The choice among the instruction sets that the CPU kernels are compiled for. Torch-free.
#pragma once

namespace gradfuse::cpu {

enum class Isa : int { Baseline, Avx2, Avx512 };

// The widest set this machine runs, or the one named by GRADFUSE_ISA (baseline | avx2 | avx512).
// Throws std::invalid_argument if that name is unknown or the machine lacks it.
Isa isa();
const char* isa_name();

// For tests: takes another set from now on, by its name; "" for the widest. Throws as isa().
void set_isa(const char* name);

}  // namespace gradfuse::cpu

// Declares an op's table of kernels, one for each instruction set, which simd/unit.cpp compiles,
// and `name()`, that of the set in use.
#if defined(__x86_64__)
#define GRADFUSE_KERNEL_TABLE(Table, name)   \
  namespace baseline {                       \
  extern const Table name;                   \
  }                                          \
  namespace avx2 {                           \
  extern const Table name;                   \
  }                                          \
  namespace avx512 {                         \
  extern const Table name;                   \
  }                                          \
  inline const Table& name() {               \
    switch (isa()) {                         \
      case Isa::Avx512: return avx512::name; \
      case Isa::Avx2: return avx2::name;     \
      default: return baseline::name;        \
    }                                        \
  }
#else
#define GRADFUSE_KERNEL_TABLE(Table, name) \
  namespace baseline {                     \
  extern const Table name;                 \
  }                                        \
  inline const Table& name() { return baseline::name; }
#endif
