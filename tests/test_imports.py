"""What imports what: no CuPy or PyTorch unasked, arrows in one direction, and public names that exist."""

import ast
import graphlib
import inspect
import json
import operator
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tensorlite
from tensorlite import BackendError, get_backend

ROOT = Path(tensorlite.__file__).parent.parent
PACKAGE = ROOT / "tensorlite"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each part of a package may import of the others.
TENSORLITE = {
    "dtypes": set(),
    "words": set(),
    "decorators": set(),
    "random": {"decorators"},
    "backends": {"backends", "dtypes", "random", "words"},
    "autograd": {"backends", "decorators", "dtypes"},
    "tensor": {"autograd", "backends", "dtypes", "words"},
    "ops": {"ops", "tensor", "autograd", "backends", "dtypes", "random", "words"},
    "creation": {"ops", "tensor", "backends", "dtypes", "random", "words"},
    "nn": {"nn", "ops", "tensor", "backends", "dtypes", "random", "words"},
    "optim": {"nn", "tensor", "backends", "words"},
    "gradcheck": {"gradcheck", "nn", "tensor", "autograd", "backends"},
    "tools": {"tools", "autograd", "backends", "nn", "ops", "optim", "tensor"},
    "doctor": {"doctor", "backends"},  # for CuPy's cache; of the others the public names only
    "pytest_plugin": set(),  # the public names only
}
PLAIN = {"advice", "errors", "files", "terminal"}  # what knows nothing of language models
GPT = {
    "errors": set(),
    "terminal": set(),
    "advice": {"terminal"},
    "files": {"errors"},
    "settings": {"errors"},
    "tensor_file": {"errors", "files"},
    "text": {"text", *PLAIN},
    "generate": {"errors"},
    "models": {"models", "generate", "settings", "tensor_file", *PLAIN},
    "config": {"models", "settings", "text", *PLAIN},
    "checkpoint": {"config", "models", "settings", "tensor_file", "text", *PLAIN},
    "device": {"errors", "models", "terminal"},
    "needs": {"config", "models", "text"},
    "memory": {"advice", "config", "errors", "models", "needs", "text"},
    "plan": {"config", "models", "needs"},
    "cli": {"config", "models", *PLAIN},
    "log": {"errors", "files"},
    "plot": {"cli", "log", "text", *PLAIN},
}
GPT["training"] = {"training", *GPT} - {"cli"}
GPT |= {command: {command, "training", *GPT} for command in ("attention", "export", "inspect", "runs")}
ARROWS = {"tensorlite": TENSORLITE, "gpt": GPT}


def imports(path: Path) -> set[str]:
    """The modules a file imports anywhere, dotted: `from tensorlite import nn` counts as tensorlite.nn."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            here = node.module in ARROWS
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if here else {node.module}
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has loaded after the statement."""
    code = f"import sys, json; {statement}; print(json.dumps([*sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout))


def test_importing_tensorlite_loads_neither_cupy_nor_torch():
    loaded = {module.partition(".")[0] for module in modules_after("import tensorlite")}
    assert {"tensorlite", "numpy"} <= loaded
    assert not loaded & {"cupy", "cupyx", "torch", "gpt", "safetensors", "tqdm", "threadpoolctl"}


@pytest.mark.parametrize("modules", ["gpt", "gpt.export.__main__, gpt.export.huggingface, gpt.export.onnx"])
def test_importing_gpt_loads_no_library_that_is_optional(modules):
    loaded = {module.partition(".")[0] for module in modules_after(f"import {modules}")}
    assert not loaded & {"cupy", "torch", "onnx", "onnxruntime", "safetensors", "tokenizers", "transformers"}


def test_importing_tensorlite_adds_little_to_numpy():
    """Small modules of the standard library, and nothing of NumPy's that waits to be named, as np.random does."""
    added = modules_after("import tensorlite") - modules_after("import numpy")
    assert "tensorlite.gradcheck.cases" not in added
    small = {"threading"}
    assert {module for module in added if module.partition(".")[0] != "tensorlite"} <= small


def test_functional_is_the_ops():
    import tensorlite.nn.functional as F  # noqa: N812 - the name the field knows

    assert F.__all__ is tensorlite.ops.__all__
    assert all(getattr(F, name) is getattr(tensorlite.ops, name) for name in F.__all__)
    modules_after("import tensorlite; tensorlite.nn.functional.softmax")  # and is there unasked


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [path.parent.relative_to(ROOT) for package in ARROWS for path in (ROOT / package).rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(path.parts) for path in found)


def test_only_one_file_imports_cupy():
    users = {path.name for path in SOURCES if any(m.startswith("cupy") for m in imports(path))}
    assert users == {"cupy_backend.py"}


def test_only_numpy_and_the_standard_library_are_needed():
    top = {module.partition(".")[0] for path in SOURCES if part(path) != "pytest_plugin" for module in imports(path)}
    assert top <= set(sys.stdlib_module_names) | {"numpy", "cupy", "cupyx", "nvmath", "ml_dtypes", "tensorlite"}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        used = {module.split(".")[1] for module in imports(path) if module.startswith(f"{package}.")}
        if part(path) != "__init__":
            assert used <= ARROWS[package][part(path)], path


def test_nothing_knows_of_the_scripts_nor_tensorlite_of_gpt():
    for package in ARROWS:
        for path in (ROOT / package).rglob("*.py"):
            top = {module.partition(".")[0] for module in imports(path)}
            assert not top & {"train", "sample", *(["gpt"] if package == "tensorlite" else [])}, path


def test_nothing_goes_round_in_circles():
    """Whatever is imported first, all else can be."""
    for package in ARROWS:
        order = graphlib.TopologicalSorter({name: used - {name} for name, used in ARROWS[package].items()})
        assert set(order.static_order()) >= set(ARROWS[package])


def test_cupy_without_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tensorlite.backends, "_by_name", {})
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r"cannot import CuPy .*python -m tensorlite.doctor"):
        get_backend("cupy")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'nope'; the backends are numpy, cupy"):
        get_backend("nope")


@pytest.mark.parametrize("name", [*tensorlite.__all__, *(f"nn.{name}" for name in tensorlite.nn.__all__)])
def test_public_names_exist_and_are_described(name):
    assert inspect.getdoc(operator.attrgetter(name)(tensorlite))


def test_public_methods_are_described():
    undescribed = [
        f"{cls.__name__}.{name}"
        for cls in (tensorlite.Tensor, tensorlite.backends.Backend)
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not name.startswith("_") and not inspect.getdoc(member)
    ]
    assert undescribed == []
