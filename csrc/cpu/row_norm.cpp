// Traversal of layer norm and RMS norm on the CPU: the threads share the rows. A row's sweeps run
// back to back in the caches. The gradients of weight and bias are summed over fixed groups of
// rows, each into a slot of its own, and the slots in order: no bit depends on the threads.

#include "../ops/row_norm.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <memory>

#include "../math/row_norm.h"
#include "caches.h"
#include "parallel.h"
#include "row_norm_kernels.h"

namespace gradfuse::cpu {
namespace {

constexpr int64_t kLeastRowElements = 1 << 15;  // about 10 us of work
constexpr int64_t kRowItem = 16384;
constexpr int64_t kSlotRows = 64;  // keeps a slot small beside its rows
constexpr int64_t kFewSlots = 8, kMostSlots = 128;

int64_t compute_bytes(DType dtype) { return dtype == DType::Double ? 8 : 4; }

// Calls f with a pointer to the compute type.
template <class F>
void with_compute_type(DType dtype, void* p, F f) {
  if (dtype == DType::Double)
    f(static_cast<double*>(p));
  else
    f(static_cast<float*>(p));
}

// Weight and bias as the kernels read them.
class Parameters {
 public:
  Parameters(const RowNormShape& shape, RowVector weight, double offset, RowVector bias)
      : bytes_(padded_row(shape.width) * compute_bytes(shape.dtype)),
        memory_(new char[2 * bytes_]) {
    prepare(shape, weight, offset, 1.0, memory_.get());
    prepare(shape, bias, 0.0, 0.0, memory_.get() + bytes_);
  }
  RowParameters get() const { return {memory_.get(), memory_.get() + bytes_}; }

 private:
  static void prepare(const RowNormShape& shape, RowVector v, double offset, double otherwise,
                      void* to) {
    const int64_t padded = padded_row(shape.width);
    with_compute_type(shape.dtype, to, [&](auto* p) {
      using F = std::remove_pointer_t<decltype(p)>;
      std::fill(p + shape.width, p + padded, F(0));
      if (!v.data) {
        std::fill_n(p, shape.width, static_cast<F>(otherwise));
        return;
      }
      with_type<c10::Half, c10::BFloat16>(v.dtype, [&](auto type) {
        const auto* from = static_cast<const typename decltype(type)::type*>(v.data);
        for (int64_t i = 0; i < shape.width; ++i)
          p[i] = static_cast<F>(from[i]) + static_cast<F>(offset);
      });
    });
    row_norm_kernels().into_lane_order(shape.dtype, to, padded);
  }

  int64_t bytes_;
  std::unique_ptr<char[]> memory_;
};

// The scratch memory of an item of work.
class Scratch {
 public:
  explicit Scratch(const RowNormShape& shape) {
    const int64_t vector = padded_row(shape.width) * compute_bytes(shape.dtype);
    const int64_t rows = rows_at_once(shape.width);
    memory_.reset(new char[(rows + 2) * vector + kKeptBytes]);
    scratch_.rows = memory_.get();
    scratch_.partial = memory_.get() + rows * vector;
    scratch_.kept = reinterpret_cast<uint8_t*>(memory_.get() + (rows + 2) * vector);
  }
  RowScratch get() const { return scratch_; }

 private:
  std::unique_ptr<char[]> memory_;
  RowScratch scratch_;
};

struct Operand {
  const void* data;  // or null
  DType dtype;
};

// Whether to store results past the caches. Each row must begin with a cache line.
bool store_past_caches(const RowNormShape& shape, std::initializer_list<Operand> read,
                       std::initializer_list<Operand> results) {
  int64_t bytes = 0;
  for (const Operand& o : read) bytes += o.data ? element_bytes(o.dtype) : 0;
  for (const Operand& o : results) {
    if (!o.data) continue;
    bytes += element_bytes(o.dtype);
    if (!on_cache_lines(o.data) || shape.width * element_bytes(o.dtype) % kCacheLine) return false;
  }
  return stores_past_caches(bytes * shape.numel());
}

void write(RowVector v, const double* values, int64_t n) {
  if (!v.data) return;
  with_type<c10::Half, c10::BFloat16>(v.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = static_cast<T*>(v.data);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(values[i]);
  });
}

int64_t rows_of_slot(const RowNormShape& shape) {
  return std::max({std::min(kSlotRows, divided_up(shape.rows, kFewSlots)),
                   divided_up(shape.rows, kMostSlots), divided_up(kRowItem, shape.width)});
}

// Adds the slots, [slots][2][padded], and writes the gradients of bias and weight.
void merge(const RowNormBackward& call, double* slots, int64_t count) {
  const RowNormShape& shape = call.shape;
  const int64_t padded = padded_row(shape.width);
  constexpr int64_t kColumns = 512;  // a multiple of kRowPadding
  const int64_t columns = divided_up(padded, kColumns);
  for_each_item({columns, 2 * count * padded}, [&](int64_t item) {
    const int64_t begin = item * kColumns, n = std::min(kColumns, padded - begin);
    for (int k = 0; k < 2; ++k) {
      double* const total = slots + k * padded + begin;
      for (int64_t s = 1; s < count; ++s) {
        const double* const slot = total + s * 2 * padded;
        for (int64_t i = 0; i < n; ++i) total[i] += slot[i];
      }
      row_norm_kernels().into_element_order(shape.dtype, total, n);
    }
  });
  write(call.grad_bias, slots, shape.width);
  write(call.grad_weight, slots + padded, shape.width);
}

}  // namespace

void row_norm_forward(const RowNormForward& call) {
  const RowNormShape& shape = call.shape;
  const Parameters parameters(shape, call.weight, call.weight_offset, call.bias);
  const bool past_caches = store_past_caches(
      shape, {{call.addends.input, shape.dtype}, {call.addends.residual, shape.residual_dtype}},
      {{call.sum, shape.sum_dtype}, {call.output, shape.dtype}});
  const RowNormKernels& kernels = row_norm_kernels();
  const int64_t rows = divided_up(kRowItem, shape.width);
  for_each_item({divided_up(shape.rows, rows), shape.numel(), kLeastRowElements}, [&](int64_t i) {
    const Scratch scratch(shape);
    kernels.forward(call, parameters.get(), scratch.get(), i * rows,
                    std::min(shape.rows, (i + 1) * rows), past_caches);
  });
}

void row_norm_backward(const RowNormBackward& call) {
  const RowNormShape& shape = call.shape;
  const Parameters parameters(shape, call.weight, call.weight_offset, {nullptr, DType::Float});
  const bool past_caches = store_past_caches(
      shape,
      {{call.grad_output, shape.dtype},
       {call.grad_sum, shape.sum_dtype},
       {call.sum, shape.sum_dtype},
       {call.addends.input, shape.dtype},
       {call.addends.residual, shape.residual_dtype}},
      {{call.grad_input, shape.dtype}, {call.grad_residual, shape.residual_dtype}});
  const RowNormKernels& kernels = row_norm_kernels();
  const int64_t rows = rows_of_slot(shape), count = divided_up(shape.rows, rows);
  const int64_t slot = 2 * padded_row(shape.width);
  const std::unique_ptr<double[]> slots(new double[count * slot]);
  for_each_item({count, shape.numel(), kLeastRowElements}, [&](int64_t i) {
    const Scratch scratch(shape);
    kernels.backward(call, parameters.get(), scratch.get(), slots.get() + i * slot, i * rows,
                     std::min(shape.rows, (i + 1) * rows), past_caches);
  });
  if (call.grad_weight.data || call.grad_bias.data) merge(call, slots.get(), count);
}

}  // namespace gradfuse::cpu
