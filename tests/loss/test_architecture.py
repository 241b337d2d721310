"""Who may import whom, what the package needs to start, and that nothing of size N×C is ever made."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sface_kernels
from sface_kernels import sface_loss
from sface_kernels.backends import chunked
from tests.support.cases import ROOT, Case, f32

PACKAGE = ROOT / "sface_kernels"
# Imports point down: what a module may import of its own package, by the layer it is in. A new module needs its line.
BACKEND = {"ops", "types", "precision", "tracing"}
MAY_IMPORT = {
    "types": set(),
    "_version": set(),
    "tracing": set(),
    "ops": {"types", "tracing"},
    "precision": set(),
    "pages": set(),
    "validation": {"types"},
    "backends": set(),
    "backends.reference": BACKEND,
    "backends.chunked": BACKEND | {"pages"},
    "backends.native": BACKEND,
    "backends.triton": BACKEND | {"backends.triton"},
    "backends.triton.kernels": {"types", "backends.triton.kernels"},
    "backends.triton.tools": BACKEND | {"backends.triton"},
    "dispatch": {"types", "backends", "validation"},
    "verify": {"types", "dispatch", "tracing"},
    "pending": {"types", "dispatch", "precision", "verify"},
    "growing": {"pending"},
    "autograd": {"types", "ops", "dispatch", "verify", "pending", "precision", "tracing"},
    "cosines": {"ops", "precision", "tracing", "validation"},
    "summary": {"types"},
    "histograms": {"types", "ops", "validation", "precision", "tracing"},
    "loss": {
        *{"types", "ops", "dispatch", "validation", "autograd", "growing"},
        *{"cosines", "histograms", "pages", "summary"},
    },
    "angles": {"types", "ops", "validation", "precision", "histograms"},
    "__init__": {"_version", "types", "dispatch", "loss"},
    "optim": {"optim", "loss", "pages", "pending", "validation"},
    "distributed": {
        *{"distributed", "types", "ops", "dispatch", "validation", "autograd", "growing", "pending", "loss"},
        *{"cosines", "pages", "summary"},
    },
    "compat": {"types", "ops", "loss", "dispatch", "distributed", "validation", "cosines", "pages"},
    "testing": {"testing", "loss", "dispatch", "validation", "types", "pages"},
    "bench": {"bench", "testing", "loss", "optim", "precision", "dispatch", "validation", "types", "_version"},
    "bench.plots": {"bench"},
    "cli": {"cli", "bench", "testing", "angles", "dispatch", "types", "_version"},
    "__main__": {"cli"},
}


def modules() -> list[tuple[str, ast.Module]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found.append((name.removesuffix(".__init__"), ast.parse(path.read_text())))
    return found


def imports(name: str, tree: ast.Module) -> set[str]:
    """Absolute names of everything imported anywhere in a module, functions and `if` blocks included."""
    is_package = (PACKAGE / name.replace(".", "/")).is_dir() or name == "__init__"
    here = ["sface_kernels", *([] if name == "__init__" else name.split("."))]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = here[: len(here) - up] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}  # type: ignore[misc]
    return found


def layer(name: str) -> str:
    """The entry of MAY_IMPORT that a module falls under, the longest that fits."""
    parts = name.split(".")
    return next((key for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in MAY_IMPORT), name)


@pytest.mark.parametrize("name, tree", modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(name, tree):
    assert layer(name) in MAY_IMPORT, f"{name} has no place in the layers"
    allowed = MAY_IMPORT[layer(name)]
    for target in imports(name, tree):
        if target.split(".")[0] != "sface_kernels":
            continue
        inside = target.removeprefix("sface_kernels").removeprefix(".")
        parts = inside.split(".")
        fits = any(".".join(parts[:n]) in allowed for n in range(len(parts) + 1))
        assert fits, f"{name} imports {target}; it may import {sorted(allowed)} only"


def test_contributing_has_the_same_order():
    """Each layer that its chain of arrows names imports only what stands right of it, or itself."""
    (chain,) = re.findall(r"point down only:\n\n((?:    .*\n)+)", (ROOT / "CONTRIBUTING.md").read_text())
    place = {name.strip(): n for n, names in enumerate(chain.split("→")) for name in names.split(",")}
    unnamed = {"__init__", "__main__", "_version", "bench", "testing"}
    assert set(place) == {module.partition(".")[0] for module in MAY_IMPORT} - unnamed
    for module, allowed in MAY_IMPORT.items():
        here = module.partition(".")[0]
        for target in {name.partition(".")[0] for name in allowed} - {here}:
            if here in place and target in place:
                assert place[here] < place[target], f"{here} imports {target}"


def test_the_walk_sees_an_upward_import():
    """The rule itself can fail: each of these forms of a forbidden import is found."""
    for line in (
        "from .loss import sface_loss",
        "from . import loss",
        "import sface_kernels.loss",
        "from sface_kernels.loss import sface_loss",
        "def f():\n    from .loss import sface_loss",
        "import importlib\nimportlib.import_module('sface_kernels.loss')",
    ):
        assert any(target.startswith("sface_kernels.loss") for target in imports("dispatch", ast.parse(line))), line
    assert "sface_kernels.backends.chunked" in imports("backends.native", ast.parse("from . import chunked"))
    assert "sface_kernels.ops" in imports("backends.native", ast.parse("from .. import ops"))


def test_only_the_triton_backend_imports_triton():
    for name, tree in modules():
        if not name.startswith("backends.triton"):
            assert not any(target.split(".")[0] == "triton" for target in imports(name, tree)), name


def test_leaves_need_torch_and_the_standard_library_only():
    """The package imports, traces and tests without numpy or anything else. PyTorch brings typing_extensions."""
    for name, tree in modules():
        if name.startswith("backends.triton") or layer(name) in ("cli", "compat", "bench.plots", "angles"):
            continue
        foreign = (
            {target.split(".")[0] for target in imports(name, tree)}
            - {"sface_kernels", "torch", "__future__"}
            - {"typing_extensions"}
        )
        assert foreign <= sys.stdlib_module_names, f"{name}: {foreign - sys.stdlib_module_names}"


NAMES = "arange empty eye full linspace ones rand randint randn randperm tensor zeros"
FACTORIES = {f"torch.{name}" for name in NAMES.split()}
FOLLOW_THE_DEFAULT = {"compat/metric_learning.py", "compat/partial_fc.py"}  # weights, as torch.nn's modules do


def test_new_tensors_name_their_device():
    """Else they would lie where torch.set_default_device or a `with torch.device` of the caller says."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES and name not in FOLLOW_THE_DEFAULT:
                asks_for_it = ast.unparse(node) == "torch.empty(0)"  # of which only the device is read
                assert asks_for_it or "device" in {keyword.arg for keyword in node.keywords}, f"{name}:{node.lineno}"


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_the_extension():
    """No compiler, no Triton: the package imports, "auto" takes chunked and warns once, "native" says why not, tracing works."""
    in_a_process("""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ImportError("triton is blocked")

sys.meta_path.insert(0, Blocked())
import torch

def refuse(path):
    raise OSError("blocked")

torch.ops.load_library = refuse
import sface_kernels
from torch._subclasses import FakeTensorMode

assert sface_kernels.available_backends()[0] == "chunked", sface_kernels.available_backends()
text = sface_kernels.explain()
assert "-> chunked" in text and "the C++ extension" in text, text
x, w, y = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8), torch.tensor([0, 1, 4])
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        sface_kernels.sface_loss(x, w, y).backward()
    sface_kernels.sface_loss(x.double(), w.double(), y)  # native takes no float64: nothing is missing there
(warning,) = said
assert "'chunked' runs on cpu" in str(warning.message) and "--no-build-isolation" in str(warning.message), warning
try:
    sface_kernels.sface_loss(x, w, y, backend="native")
except RuntimeError as error:
    assert "'native' cannot run here" in str(error) and "the C++ extension" in str(error), error
else:
    raise AssertionError("an explicit backend fell back")
# schemas and fakes are there without the implementation
with FakeTensorMode():
    x, w, y = torch.empty(3, 8), torch.empty(5, 8), torch.empty(3, dtype=torch.int64)
    out = torch.ops.sface.native_forward(x, w, y, 64.0, 80.0, 80.0, 0.8, 1.23, 0.0, True, True, 15)
    assert out[0].shape == (3,)
""")


def test_every_package_is_installed():
    """setuptools takes the list in pyproject.toml as it stands; an editable install hides what is missing from it."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(sface_kernels[a-z_.]*)",', text[text.index("packages = [") :]))
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert listed == there


def test_kernels_compile_nothing_of_the_standard_library_for_an_instruction_set():
    """The linker could pick such a copy of a shared function for a CPU without it (csrc/cpu/simd/avx512.cpp)."""
    files = sorted((ROOT / "csrc" / "cpu").rglob("*.inl"))
    used = {name for path in files for name in re.findall(r"std::(\w+)", path.read_text())}
    assert files and used <= {"memcpy", "memset"}, used  # not templates, and in the C library


def test_import_is_light():
    """Importing starts no thread pool, no compiler, and touches no GPU; inductor and triton stay out until they are needed."""
    before = "import sys, torch; before = set(sys.modules);"
    after = "import sface_kernels; print('\\n'.join(sorted(set(sys.modules) - before)))"
    new = in_a_process(before + after).split()
    heavy = {"triton", "numpy", "torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "setuptools"}
    assert not heavy & set(new), heavy & set(new)
    assert not {f"sface_kernels.{part}" for part in ("compat", "cli", "bench", "testing", "angles")} & set(new)


def test_one_openmp_runtime(native):
    """Two would spin against each other. The extension must use the library that PyTorch brought."""
    maps = in_a_process("""
import torch, sface_kernels
x, w = torch.randn(64, 64, requires_grad=True), torch.randn(5000, 64, requires_grad=True)
sface_kernels.sface_loss(x, w, torch.arange(64), backend="native").backward()
(x @ w.t()).relu_()
print(open("/proc/self/maps").read())
""")
    files = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    assert any("sface_kernels/_C" in file for file in files)
    runtimes = {file for file in files if any(part in file for part in ("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, those inside the chunked operators included."""

    inside = {  # noqa: RUF012
        torch.ops.sface.chunked_forward.default: chunked._forward,
        torch.ops.sface.chunked_grad_weight.default: chunked._grad_weight,
    }

    def __init__(self):
        super().__init__()
        self.largest, self.where, self.seen = 0, "", set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        if func in self.inside:
            with self:
                result = self.inside[func](*args, **(kwargs or {}))  # type: ignore[operator]
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.largest:
                self.largest, self.where = tensor.numel(), str(func)
        return result


# N·C is 20 million here, larger than C·D, than the lists of active pairs and than a block of cosines.
N, C, D = 1024, 20_011, 8


def largest_tensor(backend: str, filter_eps: float) -> Sizes:
    case = Case(backend, "cpu", f32, f32)
    if case.reason_to_skip():
        pytest.skip(f"{case}: {case.reason_to_skip()}")
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    with Sizes() as sizes:
        sface_loss(x, w, torch.randint(0, C, (N,)), backend=backend, filter_eps=filter_eps).backward()
    return sizes


@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_no_tensor_of_all_pairs(backend, filter_eps):
    sizes = largest_tensor(backend, filter_eps)
    assert any(f"{backend}_grad_weight" in str(func) for func in sizes.seen), "the backward was not watched"
    assert sizes.largest < N * C, f"{sizes.where} returned {sizes.largest} elements"


def test_the_watch_sees_a_tensor_of_all_pairs():
    assert largest_tensor("reference", 0.0).largest == N * C


def test_public_names():
    for name in sface_kernels.__all__:
        assert getattr(sface_kernels, name).__doc__, f"{name} has no docstring"
    assert {"SFaceLoss", "SFaceStats", "sface_loss", "available_backends", "explain"} <= set(sface_kernels.__all__)
