#include "python_args.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "../cpu/parallel.h"
#include "../math/prefetch.h"
#include "checks.h"
#include "grad_list.h"

namespace gradfuse {
namespace {

const char* type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

}  // namespace

bool is_tensor(py::handle object) {
  return PyType_IsSubtype(Py_TYPE(object.ptr()), reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

const at::Tensor& unpacked(py::handle tensor) { return THPVariable_Unpack(tensor.ptr()); }

at::Tensor tensor_of(const char* op, const char* name, py::handle object) {
  if (!is_tensor(object))
    fail<TypeError>(op, ": ", name, " must be a Tensor, got ", type_name(object));
  return unpacked(object);
}

MaybeTensor maybe_tensor(const char* op, const char* name, py::handle object) {
  if (object.is_none()) return std::nullopt;
  return tensor_of(op, name, object);
}

py::sequence sequence_of(const char* op, const char* name, py::handle object) {
  if (!PySequence_Check(object.ptr()))
    fail<TypeError>(op, ": ", name, " must be a sequence, got ", type_name(object));
  return py::reinterpret_borrow<py::sequence>(object);
}

std::vector<at::Tensor> tensors_of(const PyObject* const* objects, size_t n, Unpacker unpack,
                                   bool of_grad) {
  std::vector<at::Tensor> out(n);
  // Not t.grad(), which warns about tensors that are not leaves.
  const auto take = [&](size_t i) {
    const at::Tensor& t = unpack(objects[i]);
    out[i] = of_grad ? t.unsafeGetTensorImpl()->grad() : t;
  };
  const auto take_run = [&](size_t begin, size_t end) {
    prefetched(begin, end, take, ahead(16, [&](size_t i) { prefetch_line(objects[i]); }),
               ahead(8, [&](size_t i) { prefetch_fields(unpack(objects[i])); }));
  };
  // The parameter owns its gradient too, so that a copy needs no GIL; see for_each_run.
  if (of_grad)
    cpu::for_each_run(static_cast<int64_t>(n), take_run);
  else
    take_run(0, n);
  return out;
}

std::vector<at::Tensor> read_tensors(const char* op, TensorsArg tensors, bool of_grad) {
  PyObject* const iterable = tensors.object.ptr();
  if (is_tensor(iterable)) return tensors_of(&iterable, 1, Unpacker(iterable), of_grad);
  PyObject* sequence = PySequence_Fast(iterable, "");
  if (!sequence) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    fail<TypeError>(op, ": expected a tensor or an iterable of tensors, got ", type_name(iterable));
  }
  const THPObjectPtr owner(sequence);
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(sequence);
  PyObject* const* const items = PySequence_Fast_ITEMS(sequence);
  const auto check = [&](size_t i) {
    if (!is_tensor(items[i]))
      fail<TypeError>(op, ": expected tensors, got ", type_name(items[i]), " for tensor ", i);
  };
  prefetched(static_cast<size_t>(n), check, ahead(16, [&](size_t i) { prefetch_line(items[i]); }));
  if (n == 0) return {};
  return tensors_of(items, static_cast<size_t>(n), Unpacker(items[0]), of_grad);
}

at::Tensor checked_vector(const char* op, const char* name, py::handle object, int64_t numel) {
  const at::Tensor t = tensor_of(op, name, object);
  if (t.scalar_type() != at::kDouble || t.numel() != numel || !t.is_contiguous())
    fail<std::invalid_argument>(op, ": ", name, " must be ", numel, " numbers of float64, got ",
                                t.sizes(), " of ", t.scalar_type());
  return t;
}

MaybeTensor maybe_vector(const char* op, const char* name, py::handle object, int64_t numel) {
  if (object.is_none()) return std::nullopt;
  return checked_vector(op, name, object, numel);
}

Fields::Fields(const char* record, py::handle object, size_t count) {
  if (!PyTuple_Check(object.ptr()) ||
      PyTuple_GET_SIZE(object.ptr()) != static_cast<Py_ssize_t>(count))
    fail<TypeError>(record, ": expected a tuple of ", count, ", got ", type_name(object));
  fields_ = py::reinterpret_borrow<py::tuple>(object);
}

py::handle Fields::next() {
  return PyTuple_GET_ITEM(fields_.ptr(), static_cast<Py_ssize_t>(at_++));
}

void add_codes(py::module_& m, const char* name,
               std::initializer_list<std::pair<const char*, int>> codes) {
  py::dict numbers;
  for (const auto& [key, number] : codes) numbers[key] = number;
  if (!py::hasattr(m, "codes")) m.attr("codes") = py::dict();
  m.attr("codes")[name] = numbers;
}

}  // namespace gradfuse
