// The CPU kernels of batch normalisation, for one instruction set: sums over a span, and the
// elementwise sweep. Include after setting GRADFUSE_VEC_BYTES, inside the anonymous namespace of
// that instruction set's file.
//
// A span is a set of runs along the contiguous axis. Where that is the positions, a run has one
// channel, and its coefficients are splat over the lanes; where it is the channels, each lane has
// its own. Elements are computed in float32 (float64 for Double); sums are kept in float64 lanes.

#include "vec.h"

#include "vec_rows.h"

#include "vec_math.h"

#include "../math/activation.h"

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min is a template

template <class T>
using VecFor = typename Lanes<T>::Vec;
template <class T>
using ScalarFor = std::decay_t<decltype(VecFor<T>{}[0])>;

// Calls f with a null pointer of the element type that dtype names.
template <class F>
inline void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::Half: f(static_cast<Half*>(nullptr)); break;
    case DType::BFloat16: f(static_cast<BFloat16*>(nullptr)); break;
    case DType::Float: f(static_cast<float*>(nullptr)); break;
    case DType::Double: f(static_cast<double*>(nullptr)); break;
  }
}

// The coefficients of a run: one value of each for all its elements, or one for each element.
template <class T, int kCount>
struct Splat {
  VecFor<T> v[kCount];
  Splat(const ScalarFor<T>* p, int64_t stride) {
    for (int k = 0; k < kCount; ++k) v[k] = VecFor<T>{} + p[k * stride];
  }
  VecFor<T> operator()(int k, int64_t) const { return v[k]; }
};
template <class T, int kCount>
struct ByElement {
  const ScalarFor<T>* p;
  int64_t stride;
  VecFor<T> operator()(int k, int64_t i) const { return load(p + k * stride + i); }
};

// Calls f(offset, length, mask offset, coefficients) for each run of a span; the mask offset is in
// bytes.
template <class T, int kCount, class F>
inline void for_each_run(const BatchNormShape& shape, const Span& span,
                         const ScalarFor<T>* coefficients, int64_t stride, F f) {
  const int64_t row_bytes = shape.mask_bytes_per_row();
  for (int64_t n = span.outer; n < span.outer_end; ++n) {
    if (shape.inner == 1) {
      f(n * shape.channels + span.channel, span.channel_end - span.channel,
        n * row_bytes + span.channel / 8, ByElement<T, kCount>{coefficients, stride});
      continue;
    }
    for (int64_t c = span.channel; c < span.channel_end; ++c) {
      const int64_t row = n * shape.channels + c;
      f(row * shape.inner + span.inner, span.inner_end - span.inner,
        row * row_bytes + span.inner / 8,
        Splat<T, kCount>(coefficients + (c - span.channel), stride));
    }
  }
}

// Calls f(i, count) for each vector of a run, count being the lanes that are in it; groups of
// vectors that fill whole bytes of the mask are bracketed by begin(i, n) and end(i, n), n being
// their elements.
template <class T, class Begin, class F, class End>
inline void for_each_vector(int64_t length, Begin begin, F f, End end) {
  constexpr int64_t kLanes = Lanes<T>::count;
  constexpr int64_t kGroup = kLanes < 8 ? 8 : kLanes;
  int64_t i = 0;
  for (; i + kGroup <= length; i += kGroup) {
    begin(i, kGroup);
    for (int64_t v = 0; v < kGroup; v += kLanes) f(i, v, kLanes);
    end(i, kGroup);
  }
  if (i == length) return;
  begin(i, length - i);
  for (int64_t v = 0; i + v < length; v += kLanes) f(i, v, least(kLanes, length - i - v));
  end(i, length - i);
}

template <class T>
inline VecFor<T> load_lanes(const T* p, int64_t count) {
  return count == Lanes<T>::count ? load(p) : load_first(p, count);
}
template <class T>
inline void store_lanes(T* p, VecFor<T> v, int64_t count) {
  if (count == Lanes<T>::count)
    store(p, v);
  else
    store_first(p, v, count);
}
template <class V>
inline V first_lanes(V v, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(V{}[0]);
  if (count == lanes) return v;
  using I = typename IntsOf<V>::type;
  return (lane_numbers<I>() < (I{} + static_cast<std::decay_t<decltype(I{}[0])>>(count))) ? v : V{};
}

inline uint32_t load_mask(const uint8_t* p, int64_t elements) {
  uint32_t bits = 0;
  if (elements == 8)
    bits = *p;
  else if (elements == 16)
    std::memcpy(&bits, p, 2);
  else
    for (int64_t b = 0; b * 8 < elements; ++b) bits |= static_cast<uint32_t>(p[b]) << (8 * b);
  return bits;
}
inline void store_mask(uint8_t* p, uint32_t bits, int64_t elements) {
  if (elements == 8)
    *p = static_cast<uint8_t>(bits);
  else if (elements == 16)
    std::memcpy(p, &bits, 2);
  else
    for (int64_t b = 0; b * 8 < elements; ++b) p[b] = static_cast<uint8_t>(bits >> (8 * b));
}

// Two sums in float64 lanes, of a run or of a column.
struct TwoSums {
  Pair<DoubleVec> first = {}, second = {};
  void add(FloatVec a, FloatVec b, FloatVec c) {  // a to the first, b * c to the second
    const Pair<DoubleVec> wa = widen(a), wb = widen(b), wc = widen(c);
    first.a += wa.a, first.b += wa.b;
    second.a += wb.a * wc.a, second.b += wb.b * wc.b;
  }
  void add(DoubleVec a, DoubleVec b, DoubleVec c) {
    first.a += a;
    second.a += b * c;
  }
  void add(const TwoSums& o) {
    first.a += o.first.a, first.b += o.first.b;
    second.a += o.second.a, second.b += o.second.b;
  }
};

template <class T>
inline void add_to_columns(double* p, Pair<DoubleVec> v) {
  store(p, load(p) + v.a);
  if (!std::is_same_v<T, double>) store(p + kDoubles, load(p + kDoubles) + v.b);
}

// A vector of a run: elements [i, i + count) of the run that begins at `offset` in the tensor and
// at byte `mask` in the mask. `column` is the channel of its first lane, relative to the span.
struct Piece {
  int64_t offset, mask, i, count, column;
  int64_t at() const { return offset + i; }
};

// Sums over a span of what terms(piece, sums) adds for each vector.
template <class T, class Terms>
inline void sum_span(const BatchNormShape& shape, const Span& span, double* sums, int64_t stride,
                     Terms terms) {
  constexpr int64_t kLanes = Lanes<T>::count;
  const int64_t channels = span.channel_end - span.channel;
  const int64_t row_bytes = shape.mask_bytes_per_row();
  if (shape.inner == 1) {
    constexpr int64_t kRows = 8;  // a column's sums stay in registers for so many rows
    for (int64_t n = span.outer; n < span.outer_end; n += kRows) {
      const int64_t end = least(n + kRows, span.outer_end);
      for (int64_t j = 0; j < channels; j += kLanes) {
        const int64_t count = least(kLanes, channels - j);
        TwoSums s;
        for (int64_t row = n; row < end; ++row)
          terms(Piece{row * shape.channels + span.channel, row * row_bytes + span.channel / 8, j,
                      count, j},
                s);
        add_to_columns<T>(sums + j, s.first);
        add_to_columns<T>(sums + stride + j, s.second);
      }
    }
    return;
  }
  // The channels' sums stay in memory as lanes until the span's last sample: runs may be short.
  const int64_t length = span.inner_end - span.inner;
  TwoSums held[kMostChannels];
  for (int64_t n = span.outer; n < span.outer_end; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t row = n * shape.channels + span.channel + c;
      Piece piece = {row * shape.inner + span.inner, row * row_bytes + span.inner / 8, 0, kLanes,
                     c};
      TwoSums s, t;
      for (; piece.i + 2 * kLanes <= length; piece.i += kLanes) {
        terms(piece, s);
        piece.i += kLanes;
        terms(piece, t);
      }
      for (; piece.i < length; piece.i += kLanes) {
        piece.count = least(kLanes, length - piece.i);
        terms(piece, s);
      }
      s.add(t);
      held[c].add(s);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    sums[c] += lane_sum(held[c].first.a + held[c].first.b);
    sums[stride + c] += lane_sum(held[c].second.a + held[c].second.b);
  }
}

// The sums of the differences from each channel's first element, and of their squares.
template <class T>
inline void forward_sums_of(const BatchNormForward& call, const Span& span, double* sums,
                            int64_t stride) {
  const T* x = static_cast<const T*>(call.input);
  const T* first = x + span.channel * call.shape.inner;
  ScalarFor<T> shifts[kMostChannels] = {};
  if (call.shape.inner > 1)
    for (int64_t c = 0; c < span.channel_end - span.channel; ++c)
      shifts[c] = load_first(first + c * call.shape.inner, 1)[0];
  sum_span<T>(call.shape, span, sums, stride, [&](const Piece& piece, TwoSums& s) {
    VecFor<T> k;
    if (call.shape.inner == 1)
      k = load_lanes(first + piece.column, piece.count);
    else
      k = VecFor<T>{} + shifts[piece.column];
    const VecFor<T> d = first_lanes(load_lanes(x + piece.at(), piece.count) - k, piece.count);
    s.add(d, d, d);
  });
}

void forward_sums(const BatchNormForward& call, const Span& span, double* sums, int64_t stride) {
  with_type(call.shape.dtype, [&](auto* t) {
    forward_sums_of<std::remove_pointer_t<decltype(t)>>(call, span, sums, stride);
  });
}

// Whether a mask's bit is set, by lane, at z before rounding.
template <Activation kActivation, class V, class S>
inline typename IntsOf<V>::type passes(V z, S above, S below) {
  if constexpr (kActivation == Activation::Relu) return ~(z <= above);
  if constexpr (kActivation == Activation::Relu6) return (z > above) & (z < below);
  return z > above;
}

template <class T, Activation kActivation>
inline void forward_apply_of(const BatchNormForward& call, const Span& span,
                             const void* coefficients, int64_t stride) {
  using S = ScalarFor<T>;
  using V = VecFor<T>;
  const MaskBounds bounds = mask_bounds(kActivation, call.shape.dtype);
  const S above = static_cast<S>(bounds.above), below = static_cast<S>(bounds.below);
  const S slope = static_cast<S>(call.negative_slope);
  for_each_run<T, kForwardCoefficients>(
      call.shape, span, static_cast<const S*>(coefficients), stride,
      [&](int64_t offset, int64_t length, int64_t mask_offset, const auto& coefficient) {
        const T* x = static_cast<const T*>(call.input) + offset;
        const T* r = call.residual ? static_cast<const T*>(call.residual) + offset : nullptr;
        T* y = static_cast<T*>(call.output) + offset;
        uint8_t* mask = call.mask ? call.mask + mask_offset : nullptr;
        uint32_t bits = 0;
        for_each_vector<T>(
            length, [&](int64_t, int64_t) { bits = 0; },
            [&](int64_t i, int64_t v, int64_t count) {
              const int64_t at = i + v;
              V z = (load_lanes(x + at, count) - coefficient(kMean, at)) * coefficient(kScale, at) +
                    coefficient(kShift, at);
              if (r) z += load_lanes(r + at, count);
              store_lanes(y + at, activate<kActivation, S>(z, slope), count);
              if constexpr (has_mask(kActivation)) {
                const uint32_t lanes = bits_of<V>(passes<kActivation>(z, above, below));
                bits |= (lanes & ((1u << count) - 1)) << v;
              }
            },
            [&](int64_t i, int64_t n) {
              if (has_mask(kActivation) && mask) store_mask(mask + i / 8, bits, n);
            });
      });
}

// Calls f with the activation as a constant.
template <class F>
inline void with_activation(Activation a, F f) {
  using A = Activation;
  switch (a) {
    case A::None: f(std::integral_constant<A, A::None>()); break;
    case A::Relu: f(std::integral_constant<A, A::Relu>()); break;
    case A::Relu6: f(std::integral_constant<A, A::Relu6>()); break;
    case A::LeakyRelu: f(std::integral_constant<A, A::LeakyRelu>()); break;
    case A::Silu: f(std::integral_constant<A, A::Silu>()); break;
    case A::Gelu: f(std::integral_constant<A, A::Gelu>()); break;
    case A::GeluTanh: f(std::integral_constant<A, A::GeluTanh>()); break;
    case A::Hardswish: f(std::integral_constant<A, A::Hardswish>()); break;
    case A::Sigmoid: f(std::integral_constant<A, A::Sigmoid>()); break;
    case A::Tanh: f(std::integral_constant<A, A::Tanh>()); break;
  }
}

void forward_apply(const BatchNormForward& call, const Span& span, const void* coefficients,
                   int64_t stride) {
  with_type(call.shape.dtype, [&](auto* t) {
    with_activation(call.activation, [&](auto activation) {
      forward_apply_of<std::remove_pointer_t<decltype(t)>, decltype(activation)::value>(
          call, span, coefficients, stride);
    });
  });
}

// The mask's bits of a vector that begins at element i of a run whose bytes begin at p.
inline uint32_t mask_bits(const uint8_t* p, int64_t i, int64_t count) {
  return load_mask(p + i / 8, i % 8 + count) >> (i % 8);
}

// The gradient before the activation: grad_output times act', from the mask's bits, the output, or
// z computed again. coefficient(k, i) is that of element i of the run.
template <class T, Activation kActivation, class Coefficient>
inline VecFor<T> gradient_before(const BatchNormBackward& call, const Piece& piece,
                                 const Coefficient& coefficient) {
  using S = ScalarFor<T>;
  using V = VecFor<T>;
  const int64_t at = piece.at(), count = piece.count;
  const V g = load_lanes(static_cast<const T*>(call.grad_output) + at, count);
  if constexpr (kActivation == Activation::None) {
    return g;
  } else if constexpr (needs_input(kActivation)) {
    const V x = load_lanes(static_cast<const T*>(call.input) + at, count);
    V z = (x - coefficient(kMean, piece.i)) * coefficient(kScale, piece.i) +
          coefficient(kShift, piece.i);
    if (call.residual) z += load_lanes(static_cast<const T*>(call.residual) + at, count);
    return g * derivative_at<kActivation, S>(z);
  } else if constexpr (has_mask(kActivation)) {
    const S slope = static_cast<S>(call.negative_slope);
    const V flat = kActivation == Activation::LeakyRelu ? g * slope : V{};
    if (call.mask) return lanes_of<V>(mask_bits(call.mask + piece.mask, piece.i, count)) ? g : flat;
    const V y = load_lanes(static_cast<const T*>(call.output) + at, count);
    return passes<kActivation>(y, S(0), S(6)) ? g : flat;
  } else {
    const V y = load_lanes(static_cast<const T*>(call.output) + at, count);
    return g * derivative_from_output<kActivation, S>(y, S(0));
  }
}

template <class T, Activation kActivation>
inline void backward_sums_of(const BatchNormBackward& call, const Span& span,
                             const void* coefficients, double* sums, int64_t stride) {
  using V = VecFor<T>;
  const ScalarFor<T>* p = static_cast<const ScalarFor<T>*>(coefficients);
  const T* x = static_cast<const T*>(call.input);
  const auto add = [&](const Piece& piece, const auto& coefficient, TwoSums& s) {
    const V g = first_lanes(gradient_before<T, kActivation>(call, piece, coefficient), piece.count);
    V h = V{};
    if (x)
      h = (load_lanes(x + piece.at(), piece.count) - coefficient(kMean, piece.i)) *
          coefficient(kInvstd, piece.i);
    s.add(g, g, h);
  };
  sum_span<T>(call.shape, span, sums, stride, [&](const Piece& piece, TwoSums& s) {
    if (call.shape.inner == 1)
      add(piece, ByElement<T, kBackwardCoefficients>{p, stride}, s);
    else
      add(piece, Splat<T, kBackwardCoefficients>(p + piece.column, stride), s);
  });
}

void backward_sums(const BatchNormBackward& call, const Span& span, const void* coefficients,
                   double* sums, int64_t stride) {
  with_type(call.shape.dtype, [&](auto* t) {
    with_activation(call.activation, [&](auto activation) {
      backward_sums_of<std::remove_pointer_t<decltype(t)>, decltype(activation)::value>(
          call, span, coefficients, sums, stride);
    });
  });
}

template <class T, Activation kActivation>
inline void backward_apply_of(const BatchNormBackward& call, const Span& span,
                              const void* coefficients, int64_t stride) {
  using S = ScalarFor<T>;
  using V = VecFor<T>;
  const T* x = call.training ? static_cast<const T*>(call.input) : nullptr;
  T* grad_input = static_cast<T*>(call.grad_input);
  T* grad_residual = static_cast<T*>(call.grad_residual);
  for_each_run<T, kBackwardCoefficients>(
      call.shape, span, static_cast<const S*>(coefficients), stride,
      [&](int64_t offset, int64_t length, int64_t mask_offset, const auto& coefficient) {
        constexpr int64_t kLanes = Lanes<T>::count;
        for (int64_t i = 0; i < length; i += kLanes) {
          const Piece piece = {offset, mask_offset, i, least(kLanes, length - i), 0};
          const int64_t at = piece.at();
          const V g = gradient_before<T, kActivation>(call, piece, coefficient);
          if (grad_residual) store_lanes(grad_residual + at, g, piece.count);
          if (!grad_input) continue;
          V d = g * coefficient(kDirect, i);
          if (x) {
            const V h =
                (load_lanes(x + at, piece.count) - coefficient(kMean, i)) * coefficient(kInvstd, i);
            d += h * coefficient(kSlope, i) + coefficient(kOffset, i);
          }
          store_lanes(grad_input + at, d, piece.count);
        }
      });
}

void backward_apply(const BatchNormBackward& call, const Span& span, const void* coefficients,
                    int64_t stride) {
  with_type(call.shape.dtype, [&](auto* t) {
    with_activation(call.activation, [&](auto activation) {
      backward_apply_of<std::remove_pointer_t<decltype(t)>, decltype(activation)::value>(
          call, span, coefficients, stride);
    });
  });
}
