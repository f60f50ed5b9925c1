// Adaptive gradient clipping: checks, cuts parameters into units, picks the device, binds.
#include "adaptive_clip.h"

#include "../tensor/checks.h"
#include "../tensor/dispatch.h"
#include "../tensor/event.h"
#include "../tensor/grad_list.h"
#include "../tensor/python_args.h"
#include "measure.h"

namespace gradfuse {
namespace {

// Parameters and their gradients, cut into units: the rows along the first dimension, or the whole
// of a vector or scalar. Both lists have the same groups and rows.
struct UnitList {
  GradList weights, grads;

  // The units of one device, in order; zero-size parameters are left out.
  std::vector<UnitRef> refs(size_t group);
};

UnitList check_units(const char* op, std::vector<at::Tensor> weights,
                     std::vector<at::Tensor> grads) {
  if (weights.size() != grads.size())
    fail<std::invalid_argument>(op, ": expected a gradient for each parameter, got ", grads.size(),
                                " for ", weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!grads[i].defined()) {
      weights[i].reset();
    } else if (grads[i].is_sparse() || weights[i].is_sparse()) {
      fail<TypeError>(op, ": expected dense weights and gradients, got a sparse one for parameter ",
                      i, "; clip it by its norm");
    } else if (!weights[i].sizes().equals(grads[i].sizes()) ||
               weights[i].device() != grads[i].device()) {
      fail<std::invalid_argument>(
          op, ": expected a gradient of the parameter's shape and device, got ", grads[i].sizes(),
          " on ", grads[i].device(), " for ", weights[i].sizes(), " on ", weights[i].device(),
          ", parameter ", i);
    }
  }
  UnitList list;
  list.grads = check_gradients(op, std::move(grads), Access::Write);
  for (const auto& repeat : list.grads.repeats) weights[repeat.first].reset();
  list.weights = check_gradients(op, std::move(weights), Access::Read);
  return list;
}

std::vector<UnitRef> UnitList::refs(size_t group) {
  const DeviceGroup& g = grads.groups[group];
  const DeviceGroup& w = weights.groups[group];
  std::vector<UnitRef> units;
  for (size_t i = 0; i < g.refs.size(); ++i) {
    const at::Tensor& grad = grads.tensors[g.rows[i]];
    const at::Tensor& weight = weights.tensors[w.rows[i]];
    if (grad.numel() == 0) continue;
    UnitRef unit = {w.refs[i], g.refs[i], 1, 0, 0};
    if (grad.dim() > 1) {
      unit.rows = grad.size(0);
      unit.weight_stride = weight.stride(0);
      unit.grad_stride = grad.stride(0);
      unit.weight.numel = unit.grad.numel = grad.numel() / grad.size(0);
      unit.weight.layout = layout_of(weight.select(0, 0), weights.layouts);
      unit.grad.layout = layout_of(grad.select(0, 0), grads.layouts);
    }
    units.push_back(unit);
  }
  return units;
}

void adaptive_clip_(TensorsArg weights, OptionalTensorsArg grads, double clip_factor, double eps,
                    double norm_type, OptionalTensorArg scale) {
  const char* op = "adaptive_clip_grad_";
  GRADFUSE_EVENT("gradfuse::adaptive_clip_grad_");
  const MaybeTensor loss_scale = maybe_tensor(op, "scale", scale.object);
  const bool of_grad = grads.object.is_none();
  UnitList list =
      check_units(op, read_tensors(op, weights, false),
                  read_tensors(op, of_grad ? weights : TensorsArg{{grads.object}}, of_grad));
  const py::gil_scoped_release release;
  list.grads.prepare_write();
  const UnitLimit limit = {clip_factor, eps, norm_spec(norm_type)};
  for (size_t i = 0; i < list.grads.groups.size(); ++i) {
    const at::Device device = list.grads.groups[i].device;
    const std::vector<UnitRef> units = list.refs(i);
    run_on(
        device, [&] { cpu::adaptive_clip(units, limit, scale_on_host(loss_scale)); },
        [&](Stream stream) {
          const MaybeTensor here = number_on(device, loss_scale);
          cuda::adaptive_clip(units, limit, here ? here->const_data_ptr<float>() : nullptr, stream);
        });
  }
}

}  // namespace

void bind_adaptive_clip(py::module_& m) {
  m.def("adaptive_clip_", &adaptive_clip_, py::arg("weights"), py::arg("grads"),
        py::arg("clip_factor"), py::arg("eps"), py::arg("norm_type"),
        py::arg("scale") = py::none());
}

}  // namespace gradfuse
