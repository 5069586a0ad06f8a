"""Builds the CPU kernels. Without a C compiler the package still installs; the torch kernels serve
then, and ``isobit`` says so at start-up."""

from glob import glob

from setuptools import Extension, setup

setup(
    # Setuptools leaves its script out of the packages, but under PEP 517 takes another for it.
    script_name="setup.py",
    ext_modules=[
        Extension(
            "isobit.kernels.native._isobit",
            sources=sorted(glob("kernels/native/*.c")),
            depends=sorted(glob("kernels/native/*.h")),
            # Contraction off: every fused multiply-add is written as one, so the bits are the
            # source's and not the compiler's. -fno-trapping-math changes no value; it lets the
            # compiler turn a choice between two values into a vector select.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-fopenmp",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            extra_link_args=["-fopenmp", "-lm"],
            py_limited_api=True,
            optional=True,
        )
    ],
    # The library has no Python in it (ctypes loads it), so one wheel serves every Python.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
