"""The fused operators of `kernels/`: `operators` is the suite, `fpn` its part on a CPU."""
