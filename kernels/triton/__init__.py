"""The ops as Triton kernels, for CUDA devices. Importing a module in here imports Triton."""
