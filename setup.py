"""Builds csrc/ into sface_kernels/_C.so where there is a C++ compiler; without one the package installs without it."""

import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # metadata is asked for before torch is installed, or torch is broken: the portable backend remains
    BuildExtension = CppExtension = None

# GCC and Clang: the kernels use their vector types. C++20 under the name that GCC 9 knows too.
FLAGS = ["-O3", "-std=c++2a", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# Of PyTorch's stable ABI, what 2.11 has: the library then loads under every version from there on.
FLAGS.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
# Each of these is left out by itself where the compiler, or its assembler, does not know the instruction set.
INSTRUCTION_SETS = [str(Path("csrc", "cpu", "simd", name)) for name in ("amx.cpp", "avx512.cpp", "avx2.cpp")]


def extensions() -> list:
    if CppExtension is None:
        print("warning: sface_kernels is built without its C++ kernels: no PyTorch here (pip's --no-build-isolation)")
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
            py_limited_api=True,  # links nothing of Python
            optional=True,
        )
    ]


class Wheel(bdist_wheel):
    """One for every Python: the extension is a plain library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


commands = {"bdist_wheel": Wheel}
if BuildExtension is not None:

    class PlainName(BuildExtension):
        """_C.so, without a Python's tag. Not BuildExtension.with_options, which setuptools 77 refuses."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.no_python_abi_suffix = True

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # no compiler, one that is too old, one that is broken
                print(f"warning: sface_kernels is built without its C++ kernels: {error}")
                self.extensions = []

        def build_extension(self, extension: Any) -> None:
            unknown = [source for source in INSTRUCTION_SETS if not self.compiles(source)]
            extension.sources = [source for source in extension.sources if source not in unknown]
            extension.extra_compile_args = [
                *extension.extra_compile_args,
                *(f"-DSFACE_WITHOUT_{Path(source).stem.upper()}" for source in unknown),
            ]
            super().build_extension(extension)
            for source in unknown:
                print(f"warning: sface_kernels is built without {source}: this compiler does not know its instructions")

        def compiles(self, source: str) -> bool:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    self.compiler.compile([source], output_dir=scratch, extra_postargs=[*FLAGS, "-O0"])
                except Exception:  # distutils and ninja raise errors of their own
                    return False
            return True

    commands["build_ext"] = PlainName
setup(ext_modules=extensions(), cmdclass=commands)
