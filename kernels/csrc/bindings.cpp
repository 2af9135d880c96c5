// The kernels as functions of torch tensors. kernels/csrc/build.py has checked shapes and layouts; dtypes are checked here.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include "launch.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK_VALUE(false, "expected float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

const void* pointer(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> iou_loss_of_tensors(const Tensor& boxes, const Tensor& target, const OptionalTensor& weight,
                                                       int64_t kind, double eps, bool boxes_grad, bool target_grad) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t rows = boxes.size(0);
  const auto kept = boxes.options().dtype(boxes.scalar_type() == at::kHalf ? at::kFloat : boxes.scalar_type());
  Tensor to_boxes = boxes_grad ? at::empty_like(boxes, kept) : at::empty({0}, boxes.options());
  Tensor to_target = target_grad ? at::empty_like(target, kept) : at::empty({0}, target.options());
  Tensor partial = at::empty({iou_loss_partials(rows)}, boxes.options().dtype(at::kFloat));
  if (rows)
    iou_loss(boxes.const_data_ptr(), target.const_data_ptr(), static_cast<const float*>(pointer(weight)),
             boxes_grad ? to_boxes.data_ptr() : nullptr, target_grad ? to_target.data_ptr() : nullptr,
             partial.data_ptr<float>(), rows, float(eps), Kind(kind), dtype_of(boxes), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {partial.sum(), to_boxes, to_target};
}

// shape: images, channels, positions, 1 for channels inside. stream: seed low and high, offset low and high.
struct Arguments {
  Shape shape;
  Draw draw;

  Arguments(const std::vector<int64_t>& shape_, const std::vector<int64_t>& stream, const Tensor& groups, const Tensor& words,
            const OptionalTensor& means, const OptionalTensor& variances, int64_t copies, double per_copy, double per_pair,
            bool whole_channels, int64_t combine)
      : shape{int(shape_.at(0)), int(shape_.at(1)), int(shape_.at(2)), shape_.at(3) != 0},
        draw{uint32_t(stream.at(0)),
             uint32_t(stream.at(1)),
             uint32_t(stream.at(2)),
             uint32_t(stream.at(3)),
             groups.const_data_ptr<int32_t>(),
             words.const_data_ptr<int32_t>(),
             static_cast<const float*>(pointer(means)),
             static_cast<const float*>(pointer(variances)),
             int(groups.size(0)),
             int(copies),
             float(per_copy),
             float(per_pair),
             whole_channels,
             Combine(combine)} {}
};

std::tuple<Tensor, Tensor> mc_dropout_of_tensors(const Tensor& x, const Arguments& arguments, bool with_variance) {
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor out = at::empty_like(x), variance = with_variance ? at::empty_like(x) : at::empty({0}, x.options());
  if (x.numel())
    mc_dropout(x.const_data_ptr(), out.data_ptr(), with_variance ? variance.data_ptr() : nullptr, arguments.shape,
               arguments.draw, dtype_of(x), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, variance};
}

Tensor mc_dropout_backward_of_tensors(const Tensor& grad_out, const Tensor& grad_variance, const Tensor& x,
                                      const Arguments& arguments) {
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor grad = at::empty_like(x);
  if (x.numel())
    mc_dropout_backward(x.const_data_ptr(), grad_out.const_data_ptr(), grad_variance.const_data_ptr(), grad.data_ptr(),
                        arguments.shape, arguments.draw, dtype_of(x), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  py::class_<Arguments>(module, "Arguments")
      .def(py::init<const std::vector<int64_t>&, const std::vector<int64_t>&, const Tensor&, const Tensor&,
                    const OptionalTensor&, const OptionalTensor&, int64_t, double, double, bool, int64_t>());
  module.def("iou_loss", &iou_loss_of_tensors);
  module.def("mc_dropout", &mc_dropout_of_tensors);
  module.def("mc_dropout_backward", &mc_dropout_backward_of_tensors);
}
