// Python's arguments of the bindings: their types, for signatures, and how they are read.
//
// Tensors are recognised by their type. pybind11's casts use isinstance, which accepts proxies and
// mocks, and name neither function nor argument in their errors.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <initializer_list>
#include <utility>
#include <vector>

#include "storage.h"

namespace gradfuse {

namespace py = pybind11;

// Arguments as unread Python objects.
struct Argument {
  py::handle object;
};
struct TensorArg : Argument {};
struct OptionalTensorArg : Argument {};
struct TensorsArg : Argument {};  // one tensor, or an iterable of them
struct OptionalTensorsArg : Argument {};
struct NumberArg : Argument {};  // a float, or a tensor of one
struct ParamGroupsArg : Argument {};  // an optimizer's param_groups
struct StateArg : Argument {};  // and its state
struct SlotsArg : Argument {};  // the slots that each group needs, as bits
struct FunctionArg : Argument {};
struct WantedArg : Argument {};  // whether each gradient is wanted
// NamedTuples of gradfuse/_records.py.
struct BatchNormCallArg : Argument {};
struct BatchNormSavedArg : Argument {};
struct BatchNormOptionsArg : Argument {};
struct RowNormCallArg : Argument {};
struct RowNormSavedArg : Argument {};
struct RowNormOptionsArg : Argument {};
struct StepOptionsArg : Argument {};
struct StepGroupsArg : Argument {};  // a list of AdamGroup, SGDGroup, ...

bool is_tensor(py::handle object);

// The tensor of an object that is one. Defined in one file, because the header of torch that it
// needs doubles the time of compiling a file.
const at::Tensor& unpacked(py::handle tensor);

// The same without a call, for loops over thousands of tensors: all keep it in the same place.
class Unpacker {
 public:
  Unpacker() = default;
  explicit Unpacker(py::handle any)
      : offset_(reinterpret_cast<const char*>(&unpacked(any)) -
                reinterpret_cast<const char*>(any.ptr())) {}
  const at::Tensor& operator()(const PyObject* tensor) const {
    return *reinterpret_cast<const at::Tensor*>(reinterpret_cast<const char*>(tensor) + offset_);
  }

 private:
  std::ptrdiff_t offset_ = 0;
};

// Throw a TypeError that names op and argument.
at::Tensor tensor_of(const char* op, const char* name, py::handle object);
MaybeTensor maybe_tensor(const char* op, const char* name, py::handle object);

// A sequence as its Python object; throws TypeError.
py::sequence sequence_of(const char* op, const char* name, py::handle object);

// The tensors of n objects that are some, or their .grad.
std::vector<at::Tensor> tensors_of(const PyObject* const* objects, size_t n, Unpacker unpack,
                                   bool of_grad);

// The tensors of a Python iterable, or their .grad. None and missing gradients become undefined.
std::vector<at::Tensor> read_tensors(const char* op, TensorsArg tensors, bool of_grad);

// A float64 and contiguous vector, as kernels read it; throws std::invalid_argument.
at::Tensor checked_vector(const char* op, const char* name, py::handle object, int64_t numel);
MaybeTensor maybe_vector(const char* op, const char* name, py::handle object, int64_t numel);

// The fields of a NamedTuple, read one after another.
class Fields {
 public:
  Fields(const char* record, py::handle object, size_t count);
  py::handle next();
  template <class T>
  T next_as() {
    return next().cast<T>();
  }

 private:
  py::tuple fields_;
  size_t at_ = 0;
};

// Writes the numbers of an enumeration into m.codes[name], where a test compares them with those of
// gradfuse/_codes.py.
void add_codes(py::module_& m, const char* name,
               std::initializer_list<std::pair<const char*, int>> codes);

}  // namespace gradfuse

// Casts that take every object; the annotation is for signatures.
#define GRADFUSE_ARGUMENT(Type, annotation)                       \
  template <>                                                     \
  struct pybind11::detail::type_caster<gradfuse::Type> {          \
    PYBIND11_TYPE_CASTER(gradfuse::Type, const_name(annotation)); \
    bool load(handle source, bool) {                              \
      value.object = source;                                      \
      return true;                                                \
    }                                                             \
  }

GRADFUSE_ARGUMENT(TensorArg, "torch.Tensor");
GRADFUSE_ARGUMENT(OptionalTensorArg, "torch.Tensor | None");
GRADFUSE_ARGUMENT(TensorsArg, "torch.Tensor | collections.abc.Iterable[torch.Tensor]");
GRADFUSE_ARGUMENT(OptionalTensorsArg,
                  "torch.Tensor | collections.abc.Iterable[torch.Tensor] | None");
GRADFUSE_ARGUMENT(NumberArg, "float | torch.Tensor");
GRADFUSE_ARGUMENT(ParamGroupsArg, "list[dict[str, typing.Any]]");
GRADFUSE_ARGUMENT(StateArg, "dict[torch.Tensor, typing.Any]");
GRADFUSE_ARGUMENT(SlotsArg, "collections.abc.Sequence[int]");
GRADFUSE_ARGUMENT(FunctionArg, "collections.abc.Callable[..., typing.Any]");
GRADFUSE_ARGUMENT(WantedArg, "collections.abc.Sequence[bool]");
GRADFUSE_ARGUMENT(BatchNormCallArg, "gradfuse._records.BatchNormCall");
GRADFUSE_ARGUMENT(BatchNormSavedArg, "gradfuse._records.BatchNormSaved");
GRADFUSE_ARGUMENT(BatchNormOptionsArg, "gradfuse._records.BatchNormOptions");
GRADFUSE_ARGUMENT(RowNormCallArg, "gradfuse._records.RowNormCall");
GRADFUSE_ARGUMENT(RowNormSavedArg, "gradfuse._records.RowNormSaved");
GRADFUSE_ARGUMENT(RowNormOptionsArg, "gradfuse._records.RowNormOptions");
GRADFUSE_ARGUMENT(StepOptionsArg, "gradfuse._records.StepOptions");
GRADFUSE_ARGUMENT(StepGroupsArg, "collections.abc.Sequence[gradfuse._records.StepGroup]");

#undef GRADFUSE_ARGUMENT
