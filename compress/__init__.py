"""Distill a large object detector into a small one that ships, and prove that it survived."""

__version__ = "0.1.0"
