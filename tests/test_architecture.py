"""Imports run one way, files stay small, and nothing is called utils."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "spectral_paged.kernels": ROOT / "kernels",
    "spectral_paged.scheduler": ROOT / "scheduler",
    "spectral_paged.benchmarks": ROOT / "benchmarks",
    "spectral_paged": ROOT / "spectral_paged",
}
# What each part may import of the package; a part is a subpackage or a top module. Lower parts
# never know higher ones.
CACHE = {
    "errors", "page_format", "page_layout", "presets", "decompose", "quantize", "shared_basis",
    "codec", "rope", "block_pool", "block_table", "page_pool", "prefix", "layer_group", "step",
    "attention", "sealer", "online_basis", "groups", "capacity", "cache_stats", "prefix_hit",
    "sequence_state", "sequence_table", "group_slots", "layer_spec", "pins", "cache", "kernels",
    "step_clock", "transfers", "seal_schedule", "history", "device_timer", "file_limits",
    "weak_method",
}  # fmt: skip
ENGINE = CACHE | {
    "sampling", "sampler", "outputs", "output_text", "prompts", "request_group",
    "sampled_step", "admission", "engine_counters", "request_events",
    "engine", "scheduler",
}  # fmt: skip
MODELS = CACHE | {"models", "sampling", "sampler"}
CALIBRATION = MODELS | {"calibration"}
MODEL_CACHE = CALIBRATION | {"model_cache"}
TOP = {
    "llm", "placement", "model_report", "batch_file", "batch_run", "arguments", "readings",
    "metrics", "top", "log_format", "openai_request", "openai_answer", "text_deltas",
    "engine_options",
}  # fmt: skip
LLM = ENGINE | MODEL_CACHE | TOP
ALLOWED = {
    "kernels": {"kernels"},
    "scheduler": {"scheduler"},
    "data": set(),
    "models": MODELS,
    "calibration": CALIBRATION,
    "model_cache": MODEL_CACHE,
    "integrations": MODEL_CACHE | {"placement", "integrations"},
    "integrations.ray": LLM | {"integrations"},  # it runs batch files, so it stands at the top
    "benchmarks": LLM | {"benchmarks", "integrations"},
    "small_llama": {"small_llama"},
    "adapter": CACHE,
    "conformance": LLM | {"conformance", "adapter", "small_llama"},
    "server": LLM | {"server"},
    "cli": LLM | {"benchmarks", "server", "integrations", "cli"},
    "__init__": LLM,
    **dict.fromkeys(CACHE - {"kernels"}, CACHE),
    **dict.fromkeys(ENGINE - CACHE - {"scheduler"}, ENGINE),
    **dict.fromkeys(TOP, LLM),
}


def imports(source, package):
    """Dotted names that a module of `package` imports, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
            else:
                module = node.module
            names.add(module)
            names |= {f"{module}.{a.name}" for a in node.names}
    return names


def part_of(name):
    """The part of the package that a dotted name belongs to, or None for other packages."""
    pieces = name.split(".")
    if pieces[0] != "spectral_paged":
        return None
    return pieces[1] if len(pieces) > 1 else "__init__"


def known_parts():
    parts = {p.stem for p in FOLDERS["spectral_paged"].glob("*.py")}
    folders = {p.parent.name for p in FOLDERS["spectral_paged"].glob("*/__init__.py")}
    return parts | folders | {"kernels", "scheduler", "benchmarks"}


def violations(part, package, source):
    names = imports(source, package)
    used = {part_of(n) for n in names} & known_parts() - {"__init__"}
    # the root re-exports the highest layer: `from spectral_paged import LLM` is an import of it
    exports = {n for n in names if re.fullmatch(r"spectral_paged\.(?!__)\w+", n)}
    exports = {n for n in exports if part_of(n) not in known_parts()}
    return sorted(used - ALLOWED[part]) + sorted(exports if part not in ("cli", "__init__") else ())


def modules():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            part = package.split(".")[1] if "." in package else inner[0]
            dotted = ".".join(inner)
            part = dotted if len(inner) > 1 and dotted in ALLOWED else part
            yield pytest.param(part, ".".join([package, *inner[:-1]]), path, id=str(
                path.relative_to(ROOT)))  # fmt: skip


@pytest.mark.parametrize("part, package, path", list(modules()))
def test_imports_run_one_way(part, package, path):
    assert violations(part, package, path.read_text()) == []


@pytest.mark.parametrize("part, package, path", list(modules()))
def test_files_can_be_held_in_the_head(part, package, path):
    assert len(path.read_text().splitlines()) <= 450
    assert path.stem not in ("utils", "helpers", "misc", "common")


@pytest.mark.parametrize("part", ["kernels", "scheduler"])
def test_leaf_packages_know_their_own_world_only(part):
    outside = {"kernels": ("transformers",), "scheduler": ("torch", "numpy", "transformers")}[part]
    for path in FOLDERS[f"spectral_paged.{part}"].glob("*.py"):
        roots = {n.split(".")[0] for n in imports(path.read_text(), f"spectral_paged.{part}")}
        assert not roots & set(outside), path


@pytest.mark.parametrize(
    "part, source",
    [
        ("kernels", "from spectral_paged.cache import SpectralKVCache"),
        ("kernels", "def f():\n    import spectral_paged.page_format"),
        ("kernels", "from ..codec import encode_pages"),
        ("kernels", "from spectral_paged import PageFormat"),
        ("cache", "from spectral_paged import LLM"),
        ("cache", "from spectral_paged.models.geometry import rotary_table"),
        ("llm", "from spectral_paged.benchmarks import quality"),
        ("cache", "from spectral_paged import engine"),
        ("cache", "from .llm import LLM"),
        ("engine", "import spectral_paged.models.loader"),
        ("scheduler", "from spectral_paged.block_pool import BlockPool"),
        ("models", "from spectral_paged.engine import Engine"),
        ("models", "from spectral_paged.calibration import calibrate"),
        ("cache", "from spectral_paged.calibration import calibrate"),
        ("calibration", "from spectral_paged.llm import LLM"),
        ("calibration", "from spectral_paged.engine import Engine"),
    ],
)
def test_the_walker_sees_a_violation(part, source):
    package = f"spectral_paged.{part}" if part in ("kernels", "scheduler") else "spectral_paged"
    assert violations(part, package, source)


def test_every_module_has_a_place_in_the_order():
    """A new module is refused until ALLOWED says what it may know."""
    assert known_parts() - set(ALLOWED) == set()
