// The CPU kernels of batch normalisation for one instruction set: sums over a span, and the
// elementwise sweep.
//
// Where positions are contiguous, the vectors of a run belong to one channel, whose coefficients
// are splat over the lanes. Where channels are, each lane has its own, and a vector of coefficients
// serves some rows before the next is loaded. Elements are computed in float32 (float64 for
// Double); sums are kept in float64 lanes.
#ifndef GRADFUSE_CPU_BATCH_NORM_KERNELS_H
#define GRADFUSE_CPU_BATCH_NORM_KERNELS_H

#include "../math/batch_norm.h"
#include "../ops/batch_norm.h"
#include "isa.h"

namespace gradfuse::cpu {

// A part of a tensor [outer, channels, inner]. In the channels-last layouts (inner == 1) it is some
// columns of some rows.
struct Span {
  int64_t outer, outer_end;
  int64_t channel, channel_end;
  int64_t inner, inner_end;  // the first a multiple of 8, so that no byte of the mask is in two
};

// Where inner > 1, the most channels of a span.
constexpr int64_t kMostChannels = 64;

// Per-channel vectors lie side by side in one array, `stride` apart, that begins at the span's
// first channel; `stride` is a multiple of kChannelPadding, and every vector may be read to its
// end. Coefficients are of the type that elements are computed in: double for Double, else float.
constexpr int64_t kChannelPadding = 16;
enum ForwardCoefficient { kMean, kScale, kShift, kForwardCoefficients };
// The first three as above: what the forward normalised with.
enum BackwardCoefficient {
  kInvstd = kForwardCoefficients,
  kDirect,
  kSlope,
  kOffset,
  kBackwardCoefficients
};

struct BatchNormKernels {
  // Adds the sums of x - kMean, which is not shrunk here, and of its square to sums[0] and sums[1].
  // Reads the span once. A few
  // float32 terms are added up in float32 before they are widened; if `wide`, none, so that no
  // finite term is lost.
  void (*forward_sums)(const BatchNormForward& call, const Span& span, const void* coefficients,
                       double* sums, int64_t stride, bool wide);
  // Writes the output and the mask. Reads input and residual once.
  void (*forward_apply)(const BatchNormForward& call, const Span& span, const void* coefficients,
                        int64_t stride);
  // Adds the sums of g and of g * h, as math/batch_norm.h names them, to sums[0] and sums[1].
  void (*backward_sums)(const BatchNormBackward& call, const Span& span, const void* coefficients,
                        double* sums, int64_t stride, bool wide);
  // Writes the gradients of input and residual that are wanted.
  void (*backward_apply)(const BatchNormBackward& call, const Span& span, const void* coefficients,
                         int64_t stride);
};
GRADFUSE_KERNEL_TABLE(BatchNormKernels, batch_norm_kernels)

}  // namespace gradfuse::cpu

#endif

#ifdef GRADFUSE_IN_UNIT
namespace {

#include "simd/vec.h"
#include "simd/vec_io.h"
#include "simd/vec_math.h"

#include "../math/activation_functions.h"

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min is a template

template <class T>
using VecFor = typename Lanes<T>::Vec;
template <class T>
using ScalarFor = std::decay_t<decltype(VecFor<T>{}[0])>;

// Vectors are whole except the last of a run, which the compiler is told apart.
template <class T>
struct Whole {
  static constexpr int64_t lanes = Lanes<T>::count;
};
struct Some {
  int64_t lanes;
};

template <class T>
inline VecFor<T> load_lanes(const T* p, Whole<T>) {
  return load(p);
}
template <class T>
inline VecFor<T> load_lanes(const T* p, Some count) {
  return load_first(p, count.lanes);
}
template <class T>
inline void store_lanes(T* p, VecFor<T> v, Whole<T>) {
  store(p, v);
}
template <class T>
inline void store_lanes(T* p, VecFor<T> v, Some count) {
  store_first(p, v, count.lanes);
}
// The vector with zeros in the lanes that are not in it.
template <class T, class V>
inline V only_lanes(V v, Whole<T>) {
  return v;
}
template <class V>
inline V only_lanes(V v, Some count) {
  using I = typename IntsOf<V>::type;
  using Lane = std::decay_t<decltype(I{}[0])>;
  return (lane_numbers<I>() < (I{} + static_cast<Lane>(count.lanes))) ? v : V{};
}

// One vector of a span.
template <class T, class Count>
struct Piece {
  int64_t at;  // of its first element, in the tensor
  int64_t byte;  // of the mask, where its first bit is
  int shift;  // of that bit in the byte
  Count count;

  Piece(const BatchNormShape& shape, int64_t row, int64_t i, Count n)
      : at(row * (shape.inner == 1 ? shape.channels : shape.inner) + i),
        byte(row * shape.mask_bytes_per_row() + i / 8),
        shift(Lanes<T>::count < 8 ? i % 8 : 0),
        count(n) {}

  uint32_t load_bits(const uint8_t* mask) const {
    const uint8_t* p = mask + byte;
    if (count.lanes <= 8) return *p >> shift;
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return bits;
  }
  void store_bits(uint8_t* mask, uint32_t bits) const {
    uint8_t* p = mask + byte;
    if (count.lanes < Lanes<T>::count) bits &= (1u << count.lanes) - 1;
    if (count.lanes <= 8) {
      *p = static_cast<uint8_t>(shift ? *p | bits << shift : bits);
    } else {
      const uint16_t two = static_cast<uint16_t>(bits);
      std::memcpy(p, &two, 2);
    }
  }
};

template <class T>
struct Coefficients {
  VecFor<T> v[kBackwardCoefficients];
};

constexpr int kFold = 8;

// Goes through a span: body(piece, coefficients, state) for each vector, then done(column, state)
// for the state of a run or, for kRows rows, of a vector of columns, counted from the span's first;
// state.fold() after kFold vectors at most.
template <class T, int kCount, int kRows, class State, class Body, class Done>
inline void traverse(const BatchNormShape& shape, const Span& span, const void* coefficients,
                     int64_t stride, Body body, Done done) {
  constexpr int64_t kLanes = Lanes<T>::count;
  const ScalarFor<T>* p = static_cast<const ScalarFor<T>*>(coefficients);
  const int64_t channels = span.channel_end - span.channel;
  if (shape.inner == 1) {
    for (int64_t n = span.outer; n < span.outer_end; n += kRows) {
      const int64_t end = least(n + kRows, span.outer_end);
      const auto columns = [&](int64_t j, auto count) {
        Coefficients<T> c;
        for (int k = 0; k < kCount; ++k) c.v[k] = load(p + k * stride + j);
        State state;
        for (int64_t row = n; row < end; ++row)
          body(Piece<T, decltype(count)>(shape, row, span.channel + j, count), c, state);
        state.fold();
        done(j, state);
      };
      int64_t j = 0;
      for (; j + kLanes <= channels; j += kLanes) columns(j, Whole<T>());
      if (j < channels) columns(j, Some{channels - j});
    }
    return;
  }
  for (int64_t n = span.outer; n < span.outer_end; ++n) {
    for (int64_t j = 0; j < channels; ++j) {
      Coefficients<T> c;
      for (int k = 0; k < kCount; ++k) c.v[k] = VecFor<T>{} + p[k * stride + j];
      State state;
      const int64_t row = n * shape.channels + span.channel + j;
      int64_t i = span.inner;
      for (; i + kFold * kLanes <= span.inner_end; i += kFold * kLanes) {
        for (int k = 0; k < kFold; ++k)
          body(Piece<T, Whole<T>>(shape, row, i + k * kLanes, Whole<T>()), c, state);
        state.fold();
      }
      for (; i + kLanes <= span.inner_end; i += kLanes)
        body(Piece<T, Whole<T>>(shape, row, i, Whole<T>()), c, state);
      if (i < span.inner_end)
        body(Piece<T, Some>(shape, row, i, Some{span.inner_end - i}), c, state);
      state.fold();
      done(j, state);
    }
  }
}

// Two sums in float64 lanes, of a run or of a vector of columns. float32 terms are added up in
// float32 first, no more than kFold of them, unless kWide: then no product overflows or vanishes.
template <class T, bool kWide>
struct TwoSums {
  using V = VecFor<T>;
  V a = {}, b = {};
  Pair<DoubleVec> first = {}, second = {};

  void add(V x, V y, V z) {  // x to the first, y * z to the second
    if constexpr (kWide && !std::is_same_v<T, double>) {
      add_wide(widen(x), widen(y), widen(z));
    } else {
      a += x;
      b += y * z;
    }
  }
  void add_wide(Pair<DoubleVec> x, Pair<DoubleVec> y, Pair<DoubleVec> z) {
    first.a += x.a, first.b += x.b;
    second.a += y.a * z.a, second.b += y.b * z.b;
  }
  void fold() {
    if constexpr (std::is_same_v<T, double>) {
      first.a = a, second.a = b;
    } else if constexpr (!kWide) {
      const Pair<DoubleVec> wa = widen(a), wb = widen(b);
      first.a += wa.a, first.b += wa.b;
      second.a += wb.a, second.b += wb.b;
      a = b = V{};
    }
  }
};

inline void add_to(double* p, DoubleVec v) { store(p, load(p) + v); }

// Adds what terms(piece, coefficients, sums) adds to the sums [2][stride] of the span's channels.
template <class T, int kCount, bool kWide, class Terms>
inline void sum_span(const BatchNormShape& shape, const Span& span, const void* coefficients,
                     double* sums, int64_t stride, Terms terms) {
  constexpr int kRows = kFold;
  using State = TwoSums<T, kWide>;
  if (shape.inner == 1) {
    traverse<T, kCount, kRows, State>(shape, span, coefficients, stride, terms,
                                      [&](int64_t j, const State& s) {
                                        add_to(sums + j, s.first.a);
                                        add_to(sums + stride + j, s.second.a);
                                        if (Lanes<T>::count == kDoubles) return;
                                        add_to(sums + j + kDoubles, s.first.b);
                                        add_to(sums + stride + j + kDoubles, s.second.b);
                                      });
    return;
  }
  // Lanes are added up once, at the span's end: runs may be short.
  DoubleVec first[kMostChannels], second[kMostChannels];
  const int64_t channels = span.channel_end - span.channel;
  for (int64_t j = 0; j < channels; ++j) first[j] = second[j] = DoubleVec{};
  traverse<T, kCount, kRows, State>(shape, span, coefficients, stride, terms,
                                    [&](int64_t j, const State& s) {
                                      first[j] += s.first.a + s.first.b;
                                      second[j] += s.second.a + s.second.b;
                                    });
  for (int64_t j = 0; j < channels; ++j) {
    sums[j] += lane_sum(first[j]);
    sums[stride + j] += lane_sum(second[j]);
  }
}

template <class T, bool kWide>
inline void forward_sums_of(const BatchNormForward& call, const Span& span,
                            const void* coefficients, double* sums, int64_t stride) {
  const T* x = static_cast<const T*>(call.input);
  sum_span<T, kMean + 1, kWide>(
      call.shape, span, coefficients, sums, stride,
      [=](const auto& piece, const Coefficients<T>& c, TwoSums<T, kWide>& s) {
        const VecFor<T> v = load_lanes(x + piece.at, piece.count);
        const VecFor<T> shift = only_lanes(c.v[kMean], piece.count);
        if constexpr (kWide && !std::is_same_v<T, double>) {
          const Pair<DoubleVec> wide = widen(v), from = widen(shift);
          const Pair<DoubleVec> d = {wide.a - from.a, wide.b - from.b};
          s.add_wide(d, d, d);
        } else {
          const VecFor<T> d = v - shift;
          s.add(d, d, d);
        }
      });
}

void forward_sums(const BatchNormForward& call, const Span& span, const void* coefficients,
                  double* sums, int64_t stride, bool wide) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (wide)
      forward_sums_of<T, true>(call, span, coefficients, sums, stride);
    else
      forward_sums_of<T, false>(call, span, coefficients, sums, stride);
  });
}

// Whether a mask's bit is set, by lane, at z before rounding.
template <Activation kActivation, class V, class S>
inline typename IntsOf<V>::type passes(V z, S above, S below) {
  if constexpr (kActivation == Activation::Relu) return ~(z <= above);
  if constexpr (kActivation == Activation::Relu6) return (z > above) & (z < below);
  return z > above;
}

struct NoState {
  void fold() {}
};

// (x - mean) * kShrink; the coefficient is the mean times that.
template <class T>
inline VecFor<T> difference(VecFor<T> x, const Coefficients<T>& c) {
  return x * static_cast<ScalarFor<T>>(kShrink) - c.v[kMean];
}

template <class T, class Count>
inline VecFor<T> normalised(const Coefficients<T>& c, const T* x, const T* residual,
                            const Piece<T, Count>& piece) {
  const VecFor<T> d = difference<T>(load_lanes(x + piece.at, piece.count), c);
  VecFor<T> z = d * c.v[kScale] + c.v[kShift];
  if (residual) z += load_lanes(residual + piece.at, piece.count);
  return z;
}

template <class T, Activation kActivation>
inline void forward_apply_of(const BatchNormForward& call, const Span& span,
                             const void* coefficients, int64_t stride) {
  using S = ScalarFor<T>;
  constexpr int kRows = 2;  // more would be more streams than the caches like
  const MaskBounds bounds = mask_bounds(kActivation, call.shape.dtype);
  const S above = static_cast<S>(bounds.above), below = static_cast<S>(bounds.below);
  const S slope = static_cast<S>(call.negative_slope);
  const T* x = static_cast<const T*>(call.input);
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.output);
  uint8_t* mask = call.mask;
  traverse<T, kForwardCoefficients, kRows, NoState>(
      call.shape, span, coefficients, stride,
      [=](const auto& piece, const Coefficients<T>& c, NoState) {
        const VecFor<T> z = normalised(c, x, residual, piece);
        store_lanes(y + piece.at, activate<kActivation, S>(z, slope), piece.count);
        if constexpr (has_mask(kActivation))
          if (mask)
            piece.store_bits(mask, bits_of<VecFor<T>>(passes<kActivation>(z, above, below)));
      },
      [](int64_t, NoState) {});
}

void forward_apply(const BatchNormForward& call, const Span& span, const void* coefficients,
                   int64_t stride) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    with_activation(call.activation, [&](auto activation) {
      forward_apply_of<typename decltype(type)::type, decltype(activation)::value>(
          call, span, coefficients, stride);
    });
  });
}

// The gradient before the activation: grad_output times act', from the mask's bits, the output, or
// z computed again.
template <class T, Activation kActivation, class Count>
inline VecFor<T> gradient_before(const BatchNormBackward& call, const Piece<T, Count>& piece,
                                 const Coefficients<T>& c) {
  using S = ScalarFor<T>;
  using V = VecFor<T>;
  const V g = load_lanes(static_cast<const T*>(call.grad_output) + piece.at, piece.count);
  if constexpr (kActivation == Activation::None) {
    return g;
  } else if constexpr (needs_input(kActivation)) {
    return g *
           derivative_at<kActivation, S>(normalised(c, static_cast<const T*>(call.input),
                                                    static_cast<const T*>(call.residual), piece));
  } else if constexpr (has_mask(kActivation)) {
    const S slope = static_cast<S>(call.negative_slope);
    const V flat = kActivation == Activation::LeakyRelu ? g * slope : V{};
    if (call.mask) return lanes_of<V>(piece.load_bits(call.mask)) ? g : flat;
    const V y = load_lanes(static_cast<const T*>(call.output) + piece.at, piece.count);
    return passes<kActivation>(y, S(0), S(6)) ? g : flat;
  } else {
    const V y = load_lanes(static_cast<const T*>(call.output) + piece.at, piece.count);
    return g * derivative_from_output<kActivation, S>(y, S(0));
  }
}

template <class T, Activation kActivation, bool kWide>
inline void backward_sums_of(const BatchNormBackward& given, const Span& span,
                             const void* coefficients, double* sums, int64_t stride) {
  const BatchNormBackward call = given;  // by value: no store can change it
  const T* x = static_cast<const T*>(call.input);
  sum_span<T, kInvstd + 1, kWide>(
      call.shape, span, coefficients, sums, stride,
      [=](const auto& piece, const Coefficients<T>& c, TwoSums<T, kWide>& s) {
        const VecFor<T> g =
            only_lanes(gradient_before<T, kActivation>(call, piece, c), piece.count);
        VecFor<T> h = VecFor<T>{};
        if (x) h = difference<T>(load_lanes(x + piece.at, piece.count), c) * c.v[kInvstd];
        s.add(g, g, only_lanes(h, piece.count));
      });
}

void backward_sums(const BatchNormBackward& call, const Span& span, const void* coefficients,
                   double* sums, int64_t stride, bool wide) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    with_activation(call.activation, [&](auto activation) {
      using T = typename decltype(type)::type;
      constexpr Activation kActivation = decltype(activation)::value;
      if (wide)
        backward_sums_of<T, kActivation, true>(call, span, coefficients, sums, stride);
      else
        backward_sums_of<T, kActivation, false>(call, span, coefficients, sums, stride);
    });
  });
}

template <class T, Activation kActivation>
inline void backward_apply_of(const BatchNormBackward& given, const Span& span,
                              const void* coefficients, int64_t stride) {
  constexpr int kRows = 2;  // more would be more streams than the caches like
  const BatchNormBackward call = given;
  const T* x = call.training ? static_cast<const T*>(call.input) : nullptr;
  T* grad_input = static_cast<T*>(call.grad_input);
  T* grad_residual = static_cast<T*>(call.grad_residual);
  traverse<T, kBackwardCoefficients, kRows, NoState>(
      call.shape, span, coefficients, stride,
      [=](const auto& piece, const Coefficients<T>& c, NoState) {
        const VecFor<T> g = gradient_before<T, kActivation>(call, piece, c);
        if (grad_residual) store_lanes(grad_residual + piece.at, g, piece.count);
        if (!grad_input) return;
        VecFor<T> d = g * c.v[kDirect];
        if (x) {
          const VecFor<T> e = difference<T>(load_lanes(x + piece.at, piece.count), c);
          d += (e * c.v[kInvstd]) * c.v[kSlope] + c.v[kOffset];
        }
        store_lanes(grad_input + piece.at, d, piece.count);
      },
      [](int64_t, NoState) {});
}

void backward_apply(const BatchNormBackward& call, const Span& span, const void* coefficients,
                    int64_t stride) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    with_activation(call.activation, [&](auto activation) {
      backward_apply_of<typename decltype(type)::type, decltype(activation)::value>(
          call, span, coefficients, stride);
    });
  });
}

}  // namespace

const BatchNormKernels batch_norm_kernels = {forward_sums, forward_apply, backward_sums,
                                             backward_apply};

#endif
