"""The Triton kernels, one file an operator. Imported by an operator when it first runs them: only here is triton
needed. Launchers take tensors on one CUDA device (or any, in Triton's interpreter) that the operator has checked.

Conventions: float32 arithmetic whatever the inputs; sums over a program go to `partial`, one float32 a program, and
are added up by torch afterwards, so that results do not depend on the order in which programs finish.
"""
