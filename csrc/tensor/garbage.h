// Python's garbage collection of bound classes that hold Python objects.
#pragma once

#include <pybind11/pybind11.h>

namespace gradfuse {

// The C++ object of a bound class without bases, or null before it is constructed.
template <class T>
T* constructed(PyObject* self) {
  auto* const instance = reinterpret_cast<pybind11::detail::instance*>(self);
  if (!instance->simple_layout) return nullptr;
  return static_cast<T*>(instance->get_value_and_holder().value_ptr());
}

// To be passed to py::class_<T>. T has traverse(visit, arg), as Python's tp_traverse, for the
// objects it holds, and clear(), which lets them go.
template <class T>
pybind11::custom_type_setup collects_garbage() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* const type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      const T* const object = constructed<T>(self);
      return object ? object->traverse(visit, arg) : 0;
    };
    type->tp_clear = [](PyObject* self) {
      if (T* const object = constructed<T>(self)) object->clear();
      return 0;
    };
  });
}

}  // namespace gradfuse
