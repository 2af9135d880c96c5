"""Losses and operators of the trainer: one file an operator, the plain PyTorch reference beside the fast path."""
