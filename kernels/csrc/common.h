// What the device code shares: one spelling for host and device functions, and vectors of 16 bytes.
// Host functions exist so that the arithmetic can be tested without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

enum class Dtype { f32, f16, bf16 };

#ifdef __CUDACC__

// N elements that are read and written at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Of a gradient that waits for its upstream: float for half, where loss scaling must come before rounding.
template <typename T>
struct Kept {
  using type = T;
};
template <>
struct Kept<__half> {
  using type = float;
};

// Calls `function` with a value of the element type.
template <typename Function>
void with_type(Dtype dtype, Function function) {
  if (dtype == Dtype::f32) function(float{});
  if (dtype == Dtype::f16) function(__half{});
  if (dtype == Dtype::bf16) function(__nv_bfloat16{});
}

#endif
