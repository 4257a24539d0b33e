"""Imports go one way: ops, backbones, then what methods are made of, then methods, data and callbacks, then the CLI."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vil_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
OUTER = tuple(f"vil_lightning.{name}" for name in ("methods", "data", "callbacks", "evaluation", "speed", "cli"))
BUILDING_BLOCKS = {
    "allocator",
    "heads",
    "losses",
    "masking",
    "schedules",
    "optim",
    "knn",
    "sharding",
    "errors",
    "checks",
    "representation",
    "dense",
    "upernet",
}


def imports(path: Path) -> set[str]:
    """Full dotted names of all that a file imports, also inside functions; `from a import b` counts as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer(path: Path) -> str:
    """First folder or module name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def permitted(path: Path, name: str) -> bool:
    standard = name.split(".")[0] in sys.stdlib_module_names
    if within(name, "tests", "main", "pytorch_lightning", "lightly.utils.benchmarking"):
        return False
    match layer(path):
        case "ops":
            # mamba_ssm: its CUDA scan is used where it is installed
            return standard or within(name, "torch", "triton", "mamba_ssm", "vil_lightning.ops")
        case "backbones":
            own = ("vil_lightning.ops", "vil_lightning.backbones")
            return standard or within(name, "torch", "timm", "safetensors", *own)
        case "__init__":
            return within(name, "vil_lightning.backbones", "vil_lightning.ops")
        case "data" | "callbacks":
            return not within(name, "vil_lightning.methods", "vil_lightning.evaluation", "vil_lightning.cli")
        case "evaluation":
            return not within(name, "vil_lightning.cli")
        case "speed":
            return not within(name, "vil_lightning.cli", "vil_lightning.methods", "vil_lightning.data")
        case "methods":
            upward = ("data", "callbacks", "evaluation", "speed", "cli")
            return not within(name, *(f"vil_lightning.{package}" for package in upward))
        case "cli" | "checkpoint_io" | "reliability" | "look" | "out_of_memory":  # parts of the command line
            return True
        case _:  # the building blocks
            return not within(name, "lightning", *OUTER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_import_layers__a_module_imports_only_from_below(path: Path) -> None:
    assert [name for name in sorted(imports(path)) if not permitted(path, name)] == []


def test_import_layers__every_module_belongs_to_a_layer() -> None:
    known = {
        "__init__",
        "ops",
        "backbones",
        "data",
        "callbacks",
        "methods",
        "cli",
        "checkpoint_io",
        "reliability",
        "look",
        "out_of_memory",
        "evaluation",
        "speed",
    } | BUILDING_BLOCKS
    assert {layer(path) for path in FILES} <= known


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ops/mlstm.py", "timm.layers.DropPath"),
        ("ops/mlstm.py", "vil_lightning.backbones.layers"),
        ("backbones/layers.py", "lightning"),
        ("backbones/layers.py", "vil_lightning.errors"),
        ("knn.py", "lightning.pytorch.Trainer"),
        ("optim.py", "vil_lightning.methods.DINO"),
        ("data/digits.py", "vil_lightning.methods"),
        ("callbacks/views.py", "vil_lightning.cli.main"),
        ("methods/dino.py", "vil_lightning.data.MultiCrop"),
        ("cli.py", "pytorch_lightning"),
        ("methods/dino.py", "lightly.utils.benchmarking.KNNClassifier"),
    ],
)
def test_import_layers__the_rule_refuses_upward_imports(module: str, name: str) -> None:
    assert not permitted(PACKAGE / module, name)


def test_import_layers__backbones_work_without_lightning_and_lightly() -> None:
    code = """
import sys
for name in ("lightning", "lightning.pytorch", "lightly", "pytorch_lightning", "jsonargparse", "tensorboard"):
    sys.modules[name] = None
import vil_lightning, timm, torch
model = timm.create_model("vil2_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_classes=5)
print(tuple(model.eval()(torch.zeros(2, 3, 16, 16)).shape))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 5)"
