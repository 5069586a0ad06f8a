"""The CPU kernels in C, built as one shared library."""
