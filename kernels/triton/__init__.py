"""Triton kernels for CUDA devices: paged attention and the writing of K and V."""
