// Mean and variance of N dropout copies, and the gradient through both: x is read once, every result is written once.
// A thread has one quad of channels (or two, for halves with channels inside) and as many positions as 16 bytes hold.
#include "launch.h"

namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // at least, on a multiprocessor: ptxas then knows how many registers it may take

// Forward: inputs x; outputs out and variance (may be null). Backward: inputs x, grad_out, grad_variance; output grad.
template <typename T>
struct Tensors {
  const T *x, *grad_out, *grad_variance;
  T *out, *variance;
};

// What becomes of N elements that lie side by side, with their factors.
template <typename T, int N, bool backward>
__device__ void apply(const Tensors<T>& tensors, int64_t at, const float* factor, const float* variance) {
  using Values = Vector<T, N>;
  const Values x = *reinterpret_cast<const Values*>(tensors.x + at);
  Values first, second;
  if constexpr (backward) {
    const Values to_out = *reinterpret_cast<const Values*>(tensors.grad_out + at);
    const Values to_variance = *reinterpret_cast<const Values*>(tensors.grad_variance + at);
#pragma unroll
    for (int i = 0; i < N; ++i)
      first.at[i] = narrow<T>(widen(to_out.at[i]) * factor[i] + widen(to_variance.at[i]) * (2.f * widen(x.at[i]) * variance[i]));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float value = widen(x.at[i]);
      first.at[i] = narrow<T>(value * factor[i]);
      second.at[i] = narrow<T>(value * value * variance[i]);
    }
    if (tensors.variance) *reinterpret_cast<Values*>(tensors.variance + at) = second;
  }
  *reinterpret_cast<Values*>(tensors.out + at) = first;
}

// Positions inside: grid (blocks of positions * quads, images). Four rows, N positions of each.
template <typename T, int N, bool backward>
__global__ void __launch_bounds__(kThreads) rows_kernel(Tensors<T> tensors, int C, int S, Draw draw) {
  const int quads = (C + 3) / 4, blocks_of_quad = gridDim.x / quads, quad = blockIdx.x / blocks_of_quad;
  const int position = (blockIdx.x % blocks_of_quad * kThreads + threadIdx.x) * N;
  if (position >= S) return;
  const int64_t image = blockIdx.y;
  float factor[4][N], variance[4][N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Quad drawn = draw_quad(draw, uint32_t(position + n), uint32_t(image * quads + quad));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      factor[i][n] = drawn.factor[i];
      variance[i][n] = drawn.variance[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * quad + i < C) apply<T, N, backward>(tensors, (image * C + 4 * quad + i) * S + position, factor[i], variance[i]);
}

// Channels inside: grid (blocks of positions * quads, images). N channels of one position; N = 1 stands for a
// quad whose channels are taken one by one, where C is no multiple of 4.
template <typename T, int N, bool backward>
__global__ void __launch_bounds__(kThreads, kBlocks) channels_kernel(Tensors<T> tensors, int C, int S, Draw draw) {
  constexpr int kQuads = N < 4 ? 1 : N / 4;
  const int quads = (C + 3) / 4, per_position = quads / kQuads;
  const int thread = blockIdx.x * kThreads + threadIdx.x;
  const int position = thread / per_position, quad = thread % per_position * kQuads;
  if (position >= S) return;
  const int64_t image = blockIdx.y, at = (image * S + position) * C + 4 * quad;
  float factor[4 * kQuads], variance[4 * kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const Quad drawn = draw_quad(draw, uint32_t(position), uint32_t(image * quads + quad + q));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      factor[4 * q + i] = drawn.factor[i];
      variance[4 * q + i] = drawn.variance[i];
    }
  }
  if constexpr (N >= 4) {
    apply<T, N, backward>(tensors, at, factor, variance);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * quad + i < C) apply<T, 1, backward>(tensors, at + i, factor + i, variance + i);
  }
}

template <typename T, bool backward>
void launch(const Tensors<T>& tensors, const Shape& shape, const Draw& draw, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const int C = shape.channels, S = shape.positions, quads = (C + 3) / 4;
  const auto blocks = [](int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); };
  if (shape.channels_last) {
    const auto kernel = C % kWide == 0 ? channels_kernel<T, kWide, backward>
                        : C % 4 == 0   ? channels_kernel<T, 4, backward>
                                       : channels_kernel<T, 1, backward>;
    const int64_t threads = int64_t{S} * (C % kWide == 0 ? C / kWide : quads);
    kernel<<<dim3(blocks(threads), shape.images), kThreads, 0, stream>>>(tensors, C, S, draw);
  } else {
    const int width = S % kWide == 0 ? kWide : S % 2 == 0 ? 2 : 1;
    const auto kernel = width == kWide ? rows_kernel<T, kWide, backward>
                        : width == 2   ? rows_kernel<T, 2, backward>
                                       : rows_kernel<T, 1, backward>;
    kernel<<<dim3(blocks(S / width) * quads, shape.images), kThreads, 0, stream>>>(tensors, C, S, draw);
  }
}

}  // namespace

void mc_dropout(const void* x, void* out, void* variance, Shape shape, Draw draw, Dtype dtype, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tensors<T> tensors{static_cast<const T*>(x), nullptr, nullptr, static_cast<T*>(out), static_cast<T*>(variance)};
    launch<T, false>(tensors, shape, draw, stream);
  });
}

void mc_dropout_backward(const void* x, const void* grad_out, const void* grad_variance, void* grad, Shape shape, Draw draw,
                         Dtype dtype, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tensors<T> tensors{static_cast<const T*>(x), static_cast<const T*>(grad_out), static_cast<const T*>(grad_variance),
                             static_cast<T*>(grad), nullptr};
    launch<T, true>(tensors, shape, draw, stream);
  });
}
