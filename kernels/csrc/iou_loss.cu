// Weighted IoU loss of paired boxes, summed, with the gradient left behind: boxes are read once, 16 bytes at a time.
#include "launch.h"

namespace {

constexpr int kThreads = 128;
constexpr int kBoxes = 4;   // a thread
constexpr int kBlocks = 5;  // at least, on a multiprocessor: ptxas then knows how many registers it may take

template <typename T>
constexpr int kRows = 4 / sizeof(T);  // boxes in 16 bytes: one of float, two of half

template <typename T>
constexpr int kVectors = kBoxes / kRows<T>;  // a thread

template <typename T>
__device__ Box row(const Vector<T, 4 * kRows<T>>& v, int i) {
  return {widen(v.at[4 * i]), widen(v.at[4 * i + 1]), widen(v.at[4 * i + 2]), widen(v.at[4 * i + 3])};
}

template <typename G, typename Rows>
__device__ void set_row(Rows& v, int i, const Box& box, float weight) {
  v.at[4 * i] = narrow<G>(box.x1 * weight);
  v.at[4 * i + 1] = narrow<G>(box.y1 * weight);
  v.at[4 * i + 2] = narrow<G>(box.x2 * weight);
  v.at[4 * i + 3] = narrow<G>(box.y2 * weight);
}

__device__ float sum_of_block(float x) {
  __shared__ float of_warps[kThreads / 32];
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.f;
  for (int warp = 0; warp < kThreads / 32; ++warp) x += of_warps[warp];
  return x;
}

template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads, kBlocks)
    iou_loss_kernel(const T* boxes, const T* target, const float* weight, typename Kept<T>::type* to_boxes,
                    typename Kept<T>::type* to_target, float* partial, int64_t rows, float eps) {
  using G = typename Kept<T>::type;
  using Rows = Vector<T, 4 * kRows<T>>;
  using Gradient = Vector<G, 4 * kRows<G>>;        // 16 bytes too
  constexpr int kGradients = kRows<T> / kRows<G>;  // for the rows of one vector of boxes
  const int64_t vector0 = int64_t(blockIdx.x) * kVectors<T> * kThreads + threadIdx.x;
  Rows a[kVectors<T>] = {}, b[kVectors<T>] = {};
#pragma unroll
  for (int step = 0; step < kVectors<T>; ++step) {  // all loads are on their way before the first is waited for
    const int64_t vector = vector0 + step * kThreads, first = vector * kRows<T>;
    if (first + kRows<T> <= rows) {
      a[step] = reinterpret_cast<const Rows*>(boxes)[vector];
      b[step] = reinterpret_cast<const Rows*>(target)[vector];
    } else if (first < rows) {  // one box of two is left, and the vector would end outside
      for (int i = 0; i < 4; ++i) {
        a[step].at[i] = boxes[4 * first + i];
        b[step].at[i] = target[4 * first + i];
      }
    }
  }
  float total = 0.f;
#pragma unroll
  for (int step = 0; step < kVectors<T>; ++step) {
    const int64_t vector = vector0 + step * kThreads, first = vector * kRows<T>;
    Gradient by_a[kGradients], by_b[kGradients];
#pragma unroll
    for (int i = 0; i < kRows<T>; ++i) {
      const float w = first + i >= rows ? 0.f : weight ? weight[first + i] : 1.f;
      const PairLoss pair = pair_loss<kind>(row<T>(a[step], i), row<T>(b[step], i), eps);
      total += first + i >= rows ? 0.f : w * pair.loss;
      set_row<G>(by_a[i / kRows<G>], i % kRows<G>, pair.by_a, w);
      set_row<G>(by_b[i / kRows<G>], i % kRows<G>, pair.by_b, w);
    }
    if (first + kRows<T> <= rows) {
#pragma unroll
      for (int i = 0; i < kGradients; ++i) {
        if (to_boxes) reinterpret_cast<Gradient*>(to_boxes)[kGradients * vector + i] = by_a[i];
        if (to_target) reinterpret_cast<Gradient*>(to_target)[kGradients * vector + i] = by_b[i];
      }
    } else if (first < rows) {
      for (int i = 0; i < 4; ++i) {
        if (to_boxes) to_boxes[4 * first + i] = by_a[0].at[i];
        if (to_target) to_target[4 * first + i] = by_b[0].at[i];
      }
    }
  }
  total = sum_of_block(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

template <typename T, Kind kind>
void launch(const void* boxes, const void* target, const float* weight, void* to_boxes, void* to_target, float* partial,
            int64_t rows, float eps, int64_t blocks, cudaStream_t stream) {
  iou_loss_kernel<T, kind><<<unsigned(blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(boxes), static_cast<const T*>(target), weight, static_cast<typename Kept<T>::type*>(to_boxes),
      static_cast<typename Kept<T>::type*>(to_target), partial, rows, eps);
}

}  // namespace

int64_t iou_loss_partials(int64_t rows) {
  constexpr int64_t rows_of_block = int64_t{kThreads} * kBoxes;
  return (rows + rows_of_block - 1) / rows_of_block;
}

void iou_loss(const void* boxes, const void* target, const float* weight, void* to_boxes, void* to_target, float* partial,
              int64_t rows, float eps, Kind kind, Dtype dtype, cudaStream_t stream) {
  const int64_t blocks = iou_loss_partials(rows);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = kind == Kind::iou    ? launch<T, Kind::iou>
                     : kind == Kind::giou ? launch<T, Kind::giou>
                     : kind == Kind::diou ? launch<T, Kind::diou>
                                          : launch<T, Kind::ciou>;
    run(boxes, target, weight, to_boxes, to_target, partial, rows, eps, blocks, stream);
  });
}
