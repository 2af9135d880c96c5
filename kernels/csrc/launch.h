// What bindings.cpp calls. All pointers are of contiguous device memory aligned to 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "dropout.h"
#include "iou.h"

// float [partials] must be summed by the caller: the result does not depend on which block finishes first.
int64_t iou_loss_partials(int64_t rows);
void iou_loss(const void* boxes, const void* target, const float* weight, void* to_boxes, void* to_target, float* partial,
              int64_t rows, float eps, Kind kind, Dtype dtype, cudaStream_t stream);

struct Shape {
  int images, channels, positions;
  bool channels_last;
};
void mc_dropout(const void* x, void* out, void* variance, Shape shape, Draw draw, Dtype dtype, cudaStream_t stream);
void mc_dropout_backward(const void* x, const void* grad_out, const void* grad_variance, void* grad, Shape shape, Draw draw,
                         Dtype dtype, cudaStream_t stream);
