"""The walls of the code base, read from its sources: who imports whom, and what is allowed where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from matris.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("janus", "matris") for path in (ROOT / package).rglob("*.py"))

# Lowest first. A name stands for a module and for all below it that are not named themselves. Imports go to lower
# levels, or stay inside one folder; matris may import anything of janus.
LEVELS = {
    "janus": (
        (
            "janus.megatron_import",
            "janus.name_clash",
            "janus.file_errors",
            "janus.grid",
            "janus.machine",
            "janus.comm.ledger",
            "janus.comm.watch",
        ),
        ("janus", "janus.mesh", "janus.ops"),
        (
            "janus.blockwise",
            "janus.comm",
            "janus.data",
            "janus.optim",
            "janus.telemetry",
            "janus.expert_parallel.plan",
        ),
        ("janus.tensor_parallel", "janus.graph_parallel", "janus.expert_parallel", "janus.checkpoint"),
        ("janus.sharding",),
        ("janus.training",),
    ),
    "matris": (
        ("matris", "matris.units", "matris.elements", "matris.config", "matris.simulation_config", "matris.writable"),
        (
            "matris.ase_files",
            "matris.cost",
            "matris.train_config",
            "matris.model_card",
            "matris.presets",
            "matris.tensor_files",
            "matris.precision",
            "matris.graph",
            "matris.basis",
            "matris.plots",
        ),
        ("matris.data", "matris.blocks", "matris.layouts", "matris.memory", "matris.traffic"),
        ("matris.reference_fit", "matris.readout", "matris.run_data", "matris.workload"),
        ("matris.model", "matris.plan_job"),
        ("matris.exported", "matris.loss", "matris.metrics"),
        ("matris.reference", "matris.pruning", "matris.task", "matris.calculator", "matris.relax", "matris.md"),
        ("matris.budget", "matris.calibration", "matris.evaluation", "matris.reference_export"),
        ("matris.setup", "matris.convert"),
        ("matris.run_table", "matris.verify", "matris.plan"),
        ("matris.run", "matris.plan_search", "matris.plan_report"),
        ("matris.cli",),
        ("matris.__main__", "matris.megatron_options"),
        ("matris.megatron",),
    ),
}
RAW_DISTRIBUTED = ("janus/comm/", "janus/mesh.py", "janus/checkpoint/")
ENVIRONMENT = ("janus/mesh.py", "janus/training/memory.py", "matris/cli/__init__.py")
LIGHT = (
    "janus",
    "matris.units",
    "matris.elements",
    "matris.config",
    "matris.train_config",
    "matris.layouts",
    "matris.simulation_config",
    "matris.presets",
    "matris.workload",
    "janus.machine",
    "janus.grid",
    *(module for module, _ in VERBS.values()),
)
HEAVY = ("torch", "ase", "h5py", "matplotlib", "megatron", "scipy", "vesin")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level_of(module: str) -> int:
    """Level of the longest name in the table that `module` is, or is below."""
    table = {name: level for level, names in enumerate(LEVELS[module.split(".")[0]]) for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        # The package itself stands for its __init__.py alone: a new module must be given a level.
        if name in table and (length > 1 or len(parts) == 1):
            return table[name]
    raise AssertionError(f"{module} has no level: add it to LEVELS")


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of modules, and of what is imported from them, as `module.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(tree: ast.AST) -> set[str]:
    """Our modules that a source imports."""
    modules = {module_of(path) for path in SOURCES}
    names = {name for name in imports(tree) if name.split(".")[0] in LEVELS}
    return {name if name in modules else name.rpartition(".")[0] for name in names}


def same_folder(first: str, second: str) -> bool:
    """Both inside one folder below a package, as `janus.ops.silu` and `janus.ops`."""
    return len(first.split(".")) > 2 and first.split(".")[:2] == second.split(".")[:2]


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_to_lower_levels(path: Path) -> None:
    module = module_of(path)
    package = module.split(".")[0]
    for target in imported_modules(ast.parse(path.read_text())):
        if target.split(".")[0] != package:
            assert package == "matris", f"{module} imports {target}: janus knows no matris"
        elif not same_folder(module, target) and not same_folder(target, module) and target != package:
            assert level_of(target) < level_of(module), f"{module} imports {target}, which is not lower"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_raw_distributed_and_environment(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = set(imports(tree))
    names |= {f"{node.value.id}.{node.attr}" for node in ast.walk(tree) if _is_attribute_of_name(node)}
    where = path.relative_to(ROOT).as_posix()
    if not where.startswith(RAW_DISTRIBUTED):
        assert not any(name.startswith("torch.distributed") for name in names), "collectives live in janus.comm"
    if not where.startswith(ENVIRONMENT):
        assert not names & {"os.environ", "os.getenv", "os.putenv"}, "the environment is read in janus.mesh"


def _is_attribute_of_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def test_light_modules_import_nothing_heavy() -> None:
    code = (
        f"import importlib, sys\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_map_is_complete() -> None:
    """docs/architecture.md has a row, with the level, for every module but the empty ones, and for no other."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| `(\S+\.py)` \| (\d+) \|", text, re.MULTILINE))
    wanted = {
        path.relative_to(ROOT).as_posix(): str(level_of(module_of(path)))
        for path in SOURCES
        if path.name not in ("__init__.py", "__main__.py") or path.parent.name == "cli"
    }
    assert rows == wanted


@pytest.mark.parametrize("folder", ["janus", "matris", "tools", "tests"])
def test_files_are_short_and_ascii(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), f"{path} is not ASCII"
        assert len(text.splitlines()) <= 600, f"{path} is longer than 600 lines"
        assert path.name != "utils.py", f"{path}: name it after what it holds"
