// The benches' floor: checks and binding.
#include "stream.h"

#include "../tensor/checks.h"
#include "../tensor/python_args.h"

namespace gradfuse {
namespace {

std::vector<at::Tensor> buffers(const char* name, TensorsArg argument, size_t most) {
  std::vector<at::Tensor> tensors = read_tensors("stream", argument, false);
  if (tensors.size() > most)
    fail<std::invalid_argument>("stream: expected at most ", most, " tensors in ", name, ", got ",
                                tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& t = tensors[i];
    const bool is_plain = t.layout() == at::kStrided && !is_wrapper(t) && t.is_cpu();
    if (!is_plain || !t.is_contiguous() || missing_storage(t))
      fail<std::invalid_argument>("stream: expected contiguous tensors with memory on the CPU in ",
                                  name, ", got ", t.sizes(), " of layout ", t.layout(), " on ",
                                  t.device(), is_plain && !t.is_contiguous() ? " with gaps" : "",
                                  " for tensor ", i);
  }
  return tensors;
}

// One pass over the bytes of the tensors.
void stream(TensorsArg reads, TensorsArg writes, bool backwards) {
  const std::vector<at::Tensor> from = buffers("reads", reads, kMostReads);
  const std::vector<at::Tensor> to = buffers("writes", writes, kMostWrites);
  StreamCall call = {};
  call.backwards = backwards;
  call.read_count = static_cast<int>(from.size());
  call.write_count = static_cast<int>(to.size());
  if (from.empty() && to.empty()) return;
  const at::Tensor& first = from.empty() ? to[0] : from[0];
  call.bytes = static_cast<int64_t>(first.nbytes());
  for (const std::vector<at::Tensor>* list : {&from, &to})
    for (const at::Tensor& t : *list)
      if (static_cast<int64_t>(t.nbytes()) != call.bytes)
        fail<std::invalid_argument>("stream: expected tensors of ", call.bytes,
                                    " bytes, as the first, got ", t.nbytes());
  for (size_t i = 0; i < from.size(); ++i)
    call.reads[i] = static_cast<const char*>(from[i].const_data_ptr());
  for (size_t i = 0; i < to.size(); ++i)
    call.writes[i] = static_cast<char*>(to[i].mutable_data_ptr());
  const py::gil_scoped_release release;
  cpu::stream(call);
}

}  // namespace

void bind_stream(py::module_& m) {
  m.def("stream", &stream, py::arg("reads"), py::arg("writes"), py::arg("backwards") = false,
        "Reads and writes the bytes of the tensors once, without arithmetic.");
}

}  // namespace gradfuse
