"""Builds csrc/ into sface_kernels._C where there is a C++ compiler; without one the package installs without it."""

import os
import platform
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # metadata is asked for before torch is installed, or torch is broken: the portable backend remains
    BuildExtension = CppExtension = None

# GCC and Clang: the kernels use their vector types. at::parallel_for runs on one thread without -fopenmp.
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi", *OPENMP]


def extensions() -> list:
    if CppExtension is None or platform.system() == "Windows" or os.environ.get("SFACE_NO_NATIVE") == "1":
        return []
    sources = [str(path) for path in sorted(Path("csrc").rglob("*.cpp"))]
    headers = [str(path) for pattern in ("*.h", "*.inl") for path in sorted(Path("csrc").rglob(pattern))]
    return [
        CppExtension(
            "sface_kernels._C",
            sources,
            depends=headers,
            extra_compile_args=FLAGS,
            extra_link_args=OPENMP,
            optional=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)} if BuildExtension else {},
)
