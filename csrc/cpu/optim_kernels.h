// The CPU kernels of the optimizers for one instruction set. An update loads and stores each stream
// once, a vector of consecutive elements at a time. float64 is computed in float64, all other types
// in float32.
#ifndef GRADFUSE_CPU_OPTIM_KERNELS_H
#define GRADFUSE_CPU_OPTIM_KERNELS_H

#include "../ops/optim.h"
#include "isa.h"

namespace gradfuse::cpu {

// All work on elements [start, start + n) of a parameter.
struct OptimKernels {
  // Update the elements and their state.
  void (*adamw)(const ParamRef& p, int64_t start, int64_t n, const AdamWFactors<double>& factors,
                const ElementFactor& factor, const Rounding& rounding);
  void (*sgd)(const ParamRef& p, int64_t start, int64_t n, const SgdFactors<double>& factors,
              const ElementFactor& factor, const Rounding& rounding);
  void (*lion)(const ParamRef& p, int64_t start, int64_t n, const LionFactors<double>& factors,
               const ElementFactor& factor, const Rounding& rounding);
  void (*schedule_free)(const ParamRef& p, int64_t start, int64_t n,
                        const ScheduleFreeFactors<double>& factors, const ElementFactor& factor,
                        const Rounding& rounding);
  // Sum of adamw_ratio over the elements. Writes nothing.
  double (*adamw_ratio_sum)(const ParamRef& p, int64_t start, int64_t n,
                            const AdamWFactors<double>& factors, const ElementFactor& factor);
  // Sums of squares of the elements and of their lamb_direction. Writes only these.
  void (*lamb_sums)(const ParamRef& p, int64_t start, int64_t n, double weight_decay,
                    const AdamWFactors<double>& factors, const ElementFactor& factor,
                    double* param_squares, double* update_squares);
};
GRADFUSE_KERNEL_TABLE(OptimKernels, optim_kernels)

}  // namespace gradfuse::cpu

#endif

#ifdef GRADFUSE_IN_UNIT
namespace {

#include "simd/vec.h"
#include "simd/vec_io.h"

#if GRADFUSE_VEC_BYTES == 64
inline FloatVec square_root(FloatVec v) {
  return (FloatVec)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
}
inline DoubleVec square_root(DoubleVec v) {
  return (DoubleVec)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
}
#elif GRADFUSE_VEC_BYTES == 32
inline FloatVec square_root(FloatVec v) { return (FloatVec)_mm256_sqrt_ps((__m256)v); }
inline DoubleVec square_root(DoubleVec v) { return (DoubleVec)_mm256_sqrt_pd((__m256d)v); }
#else
inline FloatVec square_root(FloatVec v) {
  for (int i = 0; i < kFloats; ++i) v[i] = std::sqrt(v[i]);
  return v;
}
inline DoubleVec square_root(DoubleVec v) {
  for (int i = 0; i < kDoubles; ++i) v[i] = std::sqrt(v[i]);
  return v;
}
#endif

#include "../math/updates.h"

template <class T>
using VecOfType = typename Lanes<T>::Vec;

// Loads and stores of a whole vector, or of the first n lanes of one.
struct Whole {
  template <class T>
  auto get(const T* p) const {
    return load(p);
  }
  template <class T, class V>
  void put(T* p, V v) const {
    store(p, v);
  }
};
struct First {
  int64_t n;
  template <class T>
  auto get(const T* p) const {
    return load_first(p, n);
  }
  template <class T, class V>
  void put(T* p, V v) const {
    store_first(p, v, n);
  }
};

// Calls f(i, access) for vectors that cover [0, n), the last one partial.
template <class T, class F>
inline void for_each_vector(int64_t n, F f) {
  constexpr int64_t step = Lanes<T>::count;
  int64_t i = 0;
  for (; i + step <= n; i += step) f(i, Whole{});
  if (i < n) f(i, First{n - i});
}

// g = clamp(gradient * factor, -bound, bound). The factor is a product of three, because one number
// may not have its range. NaN stays.
template <class T>
struct Gradient {
  using V = VecOfType<T>;
  using S = std::decay_t<decltype(V{}[0])>;
  const S first, second, third;
  const V high;
  const bool plain, bounded;

  explicit Gradient(const ElementFactor& f)
      : first(static_cast<S>(f.first)),
        second(static_cast<S>(f.second)),
        third(static_cast<S>(f.third)),
        high(V{} + static_cast<S>(f.bound)),
        plain(f.second == 1.0 && f.third == 1.0),
        bounded(!std::isinf(f.bound)) {}

  V operator()(V g) const {
    g = g * first;
    if (!plain) g = g * second * third;
    if (bounded) {
      g = (g > high) ? high : g;
      g = (g < -high) ? -high : g;
    }
    return g;
  }
};

// Stores a new value of a parameter or its state, rounded to nearest or stochastically, which is
// unbiased (Croci et al. 2022, "Stochastic rounding: implementation, error analysis and
// applications").
template <class T, class V, class Access>
inline void put_rounded(T* p, V v, int64_t element, const Rounding& rounding, uint32_t stream,
                        const Access& access) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (rounding.stochastic) {
      const UIntVec index = lane_numbers<UIntVec>() + static_cast<uint32_t>(element);
      const UIntVec noise = hashed(index ^ (rounding.key + stream)) >> 16;
      const UIntVec bits = bit_cast<UIntVec>(v);
      const UIntVec cut = (bits + noise) & 0xffff0000u;
      const UIntVec whole = (bits & 0x7f800000u) == 0x7f800000u ? bits : cut;  // NaN and inf stay
      access.put(p, bit_cast<V>(whole));
      return;
    }
  }
  access.put(p, v);
}

// The parameter's value: its master's, where the parameter is still the rounded master. Elsewhere
// someone wrote the parameter since the last step, and that value counts.
template <class V, class T, class Access>
inline V value_of(const T* param, const float* master, int64_t i, const Access& access) {
  const V x = access.get(param + i);
  if constexpr (sizeof(T) == 2)
    if (master) {
      const V wide = access.get(master + i);
      return bit_cast<IntVec>(rounded_to<T>(wide)) == bit_cast<IntVec>(x) ? wide : x;
    }
  return x;
}
template <class T, class V, class Access>
inline void put_value(T* param, float* master, V v, int64_t i, int64_t start,
                      const Rounding& rounding, const Access& access) {
  if constexpr (sizeof(T) == 2)
    if (master) access.put(master + i, v);
  put_rounded(param + i, v, start + i, rounding, 0, access);
}

// Pointer to element `start`, or null if there is no data.
template <class T>
inline T* from(void* data, int64_t start) {
  return data ? static_cast<T*>(data) + start : nullptr;
}

// T is the type of the parameter, S that of its state, G that of its gradient.
template <class T, class S, class G>
void adamw_run(const ParamRef& p, int64_t start, int64_t n, const AdamWFactors<double>& factors,
               const ElementFactor& factor, const Rounding& given) {
  using V = VecOfType<T>;
  using E = typename Gradient<T>::S;
  const AdamWFactors<E> f = narrowed<E>(factors);
  const Gradient<T> gradient(factor);
  T* const param = from<T>(p.param, start);
  const G* const grad = static_cast<const G*>(p.grad) + start;
  S* const exp_avg = from<S>(p.exp_avg, start);
  S* const exp_avg_sq = from<S>(p.exp_avg_sq, start);
  S* const max_exp_avg_sq = from<S>(p.max_exp_avg_sq, start);
  float* const master = from<float>(p.master, start);
  const Rounding rounding = {given.stochastic, given.key + static_cast<uint32_t>(start >> 32)};
  for_each_vector<T>(n, [&](int64_t i, auto access) {
    V x = value_of<V>(param, master, i, access);
    V m = access.get(exp_avg + i), v = access.get(exp_avg_sq + i), top = V{};
    const V g = gradient(access.get(grad + i));
    if (max_exp_avg_sq) top = access.get(max_exp_avg_sq + i);
    adamw_update(x, g, m, v, max_exp_avg_sq ? &top : nullptr, f);
    put_value(param, master, x, i, start, rounding, access);
    put_rounded(exp_avg + i, m, start + i, rounding, 1, access);
    put_rounded(exp_avg_sq + i, v, start + i, rounding, 2, access);
    if (max_exp_avg_sq) put_rounded(max_exp_avg_sq + i, top, start + i, rounding, 3, access);
  });
}

template <class T, class S, class G>
void sgd_run(const ParamRef& p, int64_t start, int64_t n, const SgdFactors<double>& factors,
             const ElementFactor& factor, const Rounding& given) {
  using V = VecOfType<T>;
  using E = typename Gradient<T>::S;
  const SgdFactors<E> f = narrowed<E>(factors);
  const Gradient<T> gradient(factor);
  T* const param = from<T>(p.param, start);
  const G* const grad = static_cast<const G*>(p.grad) + start;
  S* const buffer = from<S>(p.exp_avg, start);  // momentum
  float* const master = from<float>(p.master, start);
  const Rounding rounding = {given.stochastic, given.key + static_cast<uint32_t>(start >> 32)};
  for_each_vector<T>(n, [&](int64_t i, auto access) {
    V x = value_of<V>(param, master, i, access);
    const V g = gradient(access.get(grad + i));
    V b = V{};
    if (buffer) b = access.get(buffer + i);
    sgd_update(x, g, buffer ? &b : nullptr, f);
    put_value(param, master, x, i, start, rounding, access);
    if (buffer) put_rounded(buffer + i, b, start + i, rounding, 1, access);
  });
}

template <class T, class S, class G>
void lion_run(const ParamRef& p, int64_t start, int64_t n, const LionFactors<double>& factors,
              const ElementFactor& factor, const Rounding& given) {
  using V = VecOfType<T>;
  using E = typename Gradient<T>::S;
  const LionFactors<E> f = narrowed<E>(factors);
  const Gradient<T> gradient(factor);
  T* const param = from<T>(p.param, start);
  const G* const grad = static_cast<const G*>(p.grad) + start;
  S* const exp_avg = from<S>(p.exp_avg, start);
  float* const master = from<float>(p.master, start);
  const Rounding rounding = {given.stochastic, given.key + static_cast<uint32_t>(start >> 32)};
  for_each_vector<T>(n, [&](int64_t i, auto access) {
    V x = value_of<V>(param, master, i, access), m = access.get(exp_avg + i);
    lion_update(x, gradient(access.get(grad + i)), m, f);
    put_value(param, master, x, i, start, rounding, access);
    put_rounded(exp_avg + i, m, start + i, rounding, 1, access);
  });
}

template <class T, class S, class G>
void schedule_free_run(const ParamRef& p, int64_t start, int64_t n,
                       const ScheduleFreeFactors<double>& factors, const ElementFactor& factor,
                       const Rounding& given) {
  using V = VecOfType<T>;
  using E = typename Gradient<T>::S;
  const ScheduleFreeFactors<E> f = narrowed<E>(factors);
  const Gradient<T> gradient(factor);
  T* const param = from<T>(p.param, start);
  const G* const grad = static_cast<const G*>(p.grad) + start;
  S* const state_z = from<S>(p.exp_avg, start);
  S* const exp_avg_sq = from<S>(p.exp_avg_sq, start);
  float* const master = from<float>(p.master, start);
  const Rounding rounding = {given.stochastic, given.key + static_cast<uint32_t>(start >> 32)};
  for_each_vector<T>(n, [&](int64_t i, auto access) {
    V y = value_of<V>(param, master, i, access);
    V z = access.get(state_z + i), v = access.get(exp_avg_sq + i);
    schedule_free_update(y, gradient(access.get(grad + i)), z, v, f);
    put_value(param, master, y, i, start, rounding, access);
    put_rounded(state_z + i, z, start + i, rounding, 1, access);
    put_rounded(exp_avg_sq + i, v, start + i, rounding, 2, access);
  });
}

// Sum of adamw_ratio over elements [start, start + n): in the compute type over blocks of 256
// vectors, in float64 over the blocks.
template <class T, class S, class G>
double ratio_run(const ParamRef& p, int64_t start, int64_t n, const AdamWFactors<double>& factors,
                 const ElementFactor& factor) {
  using V = VecOfType<T>;
  using E = typename Gradient<T>::S;
  constexpr int64_t kBlock = 256 * Lanes<T>::count;
  const AdamWFactors<E> f = narrowed<E>(factors);
  const Gradient<T> gradient(factor);
  const G* const grad = static_cast<const G*>(p.grad) + start;
  const S* const exp_avg_sq = from<S>(p.exp_avg_sq, start);
  double total = 0.0;
  for (int64_t block = 0; block < n; block += kBlock) {
    V sum = V{};
    for_each_vector<T>(n - block < kBlock ? n - block : kBlock, [&](int64_t k, auto access) {
      const int64_t i = block + k;
      sum += adamw_ratio(gradient(access.get(grad + i)), access.get(exp_avg_sq + i), f);
    });
    total += lane_sum(sum);
  }
  return total;
}

// Adds the squares of the lanes, in float64: those of float32 numbers may be beyond float32.
inline void add_squares(FloatVec v, DoubleVec& sum) {
  const Pair<DoubleVec> wide = widen(v);
  sum += wide.a * wide.a + wide.b * wide.b;
}
inline void add_squares(DoubleVec v, DoubleVec& sum) { sum += v * v; }

template <class T, class S, class G>
void lamb_run(const ParamRef& p, int64_t start, int64_t n, double weight_decay,
              const AdamWFactors<double>& factors, const ElementFactor& factor,
              double* param_squares, double* update_squares) {
  using V = VecOfType<T>;
  using E = typename Gradient<T>::S;
  const AdamWFactors<E> f = narrowed<E>(factors);
  const E decay = static_cast<E>(weight_decay);
  const Gradient<T> gradient(factor);
  const T* const param = from<T>(p.param, start);
  const G* const grad = static_cast<const G*>(p.grad) + start;
  const S* const exp_avg = from<S>(p.exp_avg, start);
  const S* const exp_avg_sq = from<S>(p.exp_avg_sq, start);
  const float* const master = from<float>(p.master, start);
  DoubleVec params = {}, updates = {};
  for_each_vector<T>(n, [&](int64_t i, auto access) {
    const V x = value_of<V>(param, master, i, access);
    add_squares(x, params);
    add_squares(lamb_direction(x, gradient(access.get(grad + i)), access.get(exp_avg + i),
                               access.get(exp_avg_sq + i), decay, f),
                updates);
  });
  *param_squares = lane_sum(params);
  *update_squares = lane_sum(updates);
}

// Calls run(Type<T>, Type<S>, Type<G>) with the types of a parameter, its state and its gradient.
template <class F>
auto with_types_of(const ParamRef& p, F run) {
  return with_types<Half, BFloat16>(p.dtype, p.state_dtype, p.grad_dtype, run);
}
template <class Tag>
using TypeOf = typename Tag::type;

void adamw(const ParamRef& p, int64_t start, int64_t n, const AdamWFactors<double>& factors,
           const ElementFactor& factor, const Rounding& rounding) {
  with_types_of(p, [&](auto t, auto s, auto g) {
    adamw_run<TypeOf<decltype(t)>, TypeOf<decltype(s)>, TypeOf<decltype(g)>>(p, start, n, factors,
                                                                             factor, rounding);
  });
}

void sgd(const ParamRef& p, int64_t start, int64_t n, const SgdFactors<double>& factors,
         const ElementFactor& factor, const Rounding& rounding) {
  with_types_of(p, [&](auto t, auto s, auto g) {
    sgd_run<TypeOf<decltype(t)>, TypeOf<decltype(s)>, TypeOf<decltype(g)>>(p, start, n, factors,
                                                                           factor, rounding);
  });
}

void lion(const ParamRef& p, int64_t start, int64_t n, const LionFactors<double>& factors,
          const ElementFactor& factor, const Rounding& rounding) {
  with_types_of(p, [&](auto t, auto s, auto g) {
    lion_run<TypeOf<decltype(t)>, TypeOf<decltype(s)>, TypeOf<decltype(g)>>(p, start, n, factors,
                                                                            factor, rounding);
  });
}

void schedule_free(const ParamRef& p, int64_t start, int64_t n,
                   const ScheduleFreeFactors<double>& factors, const ElementFactor& factor,
                   const Rounding& rounding) {
  with_types_of(p, [&](auto t, auto s, auto g) {
    schedule_free_run<TypeOf<decltype(t)>, TypeOf<decltype(s)>, TypeOf<decltype(g)>>(
        p, start, n, factors, factor, rounding);
  });
}

double adamw_ratio_sum(const ParamRef& p, int64_t start, int64_t n,
                       const AdamWFactors<double>& factors, const ElementFactor& factor) {
  return with_types_of(p, [&](auto t, auto s, auto g) {
    return ratio_run<TypeOf<decltype(t)>, TypeOf<decltype(s)>, TypeOf<decltype(g)>>(
        p, start, n, factors, factor);
  });
}

void lamb_sums(const ParamRef& p, int64_t start, int64_t n, double weight_decay,
               const AdamWFactors<double>& factors, const ElementFactor& factor,
               double* param_squares, double* update_squares) {
  with_types_of(p, [&](auto t, auto s, auto g) {
    lamb_run<TypeOf<decltype(t)>, TypeOf<decltype(s)>, TypeOf<decltype(g)>>(
        p, start, n, weight_decay, factors, factor, param_squares, update_squares);
  });
}

}  // namespace

const OptimKernels optim_kernels = {adamw, sgd, lion, schedule_free, adamw_ratio_sum, lamb_sums};

#endif
