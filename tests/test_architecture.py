"""Imports run one way, private names stay private, files stay small, and none is called utils."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from support.paths import ROOT, TESTS

# The folders that are installed as subpackages, and the package itself.
SOURCES = {
    "spectral_paged.kernels": ROOT / "kernels",
    "spectral_paged.scheduler": ROOT / "scheduler",
    "spectral_paged.benchmarks": ROOT / "benchmarks",
    "spectral_paged": ROOT / "spectral_paged",
}
# What each part may know of the package; the longest name that fits a module counts. A name covers
# all below it. Nothing is listed twice for a part and for what is inside of it.
ANYBODY = {"errors", "file_limits"}  # what everybody but the leaf packages may use
OPS = {"kernels.page", "kernels.math", "kernels.launch"}
CACHE = {"pool", "pages", "device", "rope", "kernels", "options"}
LLM = CACHE | {"cache", "sampling", "models", "engine", "scheduler", "outputs", "llm"}
MAY_KNOW: dict[str, set[str]] = {
    "kernels": set(),
    "kernels.page": set(),
    "kernels.math": {"kernels.page"},
    "kernels.launch": {"kernels.page"},
    "kernels.exact": OPS,
    "kernels.rebuild": OPS,
    "kernels.chunk": OPS,
    "kernels.seal": OPS,
    "kernels.decode": OPS | {"kernels.exact"},
    "kernels.ops": {"kernels"},
    "scheduler": set(),
    "cpu_threads": set(),
    "errors": set(),
    "file_limits": {"errors"},
    "options": {"pages"},
    "outputs": set(),
    "data": set(),
    "rope": {"kernels"},
    "pages": {"kernels"},
    "device": {"kernels"},
    "pool": {"pages", "device", "kernels.page"},
    "store": set(),
    "cache": CACHE | {"store"},
    "sampling": {"device", "outputs"},
    "sampling_params": {"sampling", "outputs"},
    "models": CACHE | {"cache", "sampling", "data"},
    "grammar": {"sampling"},
    "engine": CACHE | {"cache", "sampling", "grammar", "scheduler", "outputs"},
    "llm": LLM,
    "openai": {"engine", "sampling", "outputs"},
    "batch": {"llm", "engine", "openai", "options", "sampling", "outputs"},
    "metrics": LLM,
    "conformance": LLM,
    "integrations": LLM | {"batch"},
    "server": LLM | {"openai", "metrics"},
    "benchmarks": LLM | {"integrations", "conformance"},
    "cli": LLM | {"store", "batch", "metrics", "integrations", "server", "benchmarks"},
    "__init__": LLM | {"cpu_threads", "server"},
}


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name without `spectral_paged`, its package, and its path."""

    name: str
    package: str
    path: Path


def modules() -> list[Module]:
    found = []
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            dotted = ".".join([*package.split(".")[1:], *inner])
            is_face = inner[-1] == "__init__" and dotted != "__init__"
            name = dotted.removesuffix(".__init__") if is_face else dotted
            found.append(Module(name, ".".join(["spectral_paged", *dotted.split(".")[:-1]]), path))
    return found


MODULES = modules()
NAMES = {m.name for m in MODULES}
BY_PATH = [pytest.param(m, id=str(m.path.relative_to(ROOT))) for m in MODULES]


def imports(tree: ast.AST, package: str) -> set[str]:
    """Dotted names that a module of `package` imports, at any depth of the code."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{a.name}" for a in node.names}
    return names


def ours(source: str, package: str) -> set[str]:
    """What a source takes of the package, without `spectral_paged`; the root's own names too."""
    found = imports(ast.parse(source), package)
    return {n.partition(".")[2] or "__init__" for n in found if n.split(".")[0] == "spectral_paged"}


def covers(part: str, name: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def part_of(name: str) -> str:
    """The longest part that a dotted name belongs to; the root's exports belong to the root."""
    found = [part for part in MAY_KNOW if covers(part, name)]
    return max(found, key=len) if found else "__init__"


def violations(name: str, package: str, source: str) -> list[str]:
    part = part_of(name)
    leaf = part.split(".")[0] in ("kernels", "scheduler")
    allowed = MAY_KNOW[part] | {part} | (set() if leaf else ANYBODY)
    return sorted(n for n in ours(source, package) if not any(covers(a, n) for a in allowed))


@pytest.mark.parametrize("module", BY_PATH)
def test_imports_run_one_way(module):
    assert violations(module.name, module.package, module.path.read_text()) == []


def module_of(name: str) -> str | None:
    """The module that a dotted name is in; None for a name that a package's face hands on."""
    while name and name not in NAMES:
        name = name.rpartition(".")[0]
    return name or None


def test_no_modules_import_each_other_in_a_circle():
    """Also where only a type checker imports, and inside functions."""
    files = {m.name: m for m in MODULES if m.path.stem != "__init__"}
    used = {
        name: {module_of(n) for n in ours(m.path.read_text(), m.package)} & set(files) - {name}
        for name, m in files.items()
    }
    TopologicalSorter(used).prepare()


def test_every_folder_and_root_module_has_a_place_in_the_order():
    """A new one is refused until MAY_KNOW says what it may know."""
    inside = {m.name.split(".")[0] for m in MODULES}
    kernels = {m.name for m in MODULES if m.name.count(".") == 1 and m.name.startswith("kernels.")}
    assert inside | kernels == set(MAY_KNOW)


@pytest.mark.parametrize(
    "name, source",
    [
        ("kernels.page.layout", "from spectral_paged.errors import FormatError"),
        ("kernels.page.layout", "from spectral_paged.kernels.math.rotary import rotate"),
        ("kernels.decode.reference", "from spectral_paged.kernels.seal import triton"),
        ("kernels.ops.gpu", "def f():\n    import spectral_paged.pages.format"),
        ("kernels.ops.gpu", "from ...pages.codec import encode_pages"),
        ("kernels.ops.gpu", "from spectral_paged import PageFormat"),
        ("pool.slot_pool", "from spectral_paged.cache import SpectralKVCache"),
        ("pages.codec", "from spectral_paged.pool.arena import Arena"),
        ("cache.cache", "from spectral_paged import LLM"),
        ("cache.cache", "from spectral_paged.models.geometry import rotary_table"),
        ("cache.cache", "from spectral_paged import engine"),
        ("cache.cache", "from ..llm import LLM"),
        ("engine.engine", "import spectral_paged.models.loader"),
        ("llm", "from spectral_paged.benchmarks import quality"),
        ("scheduler.scheduler", "from spectral_paged.pool.slot_pool import SlotPool"),
        ("scheduler.scheduler", "from spectral_paged.errors import PoolError"),
        ("models.runner", "from spectral_paged.engine import Engine"),
        ("server.app", "from spectral_paged.benchmarks import quality"),
        ("a_new_folder.module", "from spectral_paged.llm import LLM"),
    ],
)
def test_the_walker_sees_a_violation(name, source):
    package = ".".join(["spectral_paged", *name.split(".")[:-1]])
    if part_of(name) == "__init__":
        assert name.split(".")[0] not in MAY_KNOW
        return
    assert violations(name, package, source)


def exported(path: Path) -> list[str] | None:
    """`__all__` of a source, or None where it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


FACES = {m.name: m.path for m in MODULES if m.path.name == "__init__.py" and m.name != "__init__"}
PUBLIC = {name: exported(path) for name, path in FACES.items()}


@pytest.mark.parametrize("name", FACES)
def test_a_package_says_what_it_is_and_what_is_public(name):
    text = ast.get_docstring(ast.parse(FACES[name].read_text()))
    assert text and text.splitlines()[0].endswith(".")
    assert PUBLIC[name] is not None and PUBLIC[name] == sorted(PUBLIC[name])


def missing(face: str, path: Path) -> list[str]:
    """Names in a face's `__all__` that it neither binds nor has as a module beside it."""
    bound = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {a.asname or a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign):
            bound |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return [n for n in exported(path) or () if n not in bound and f"{face}.{n}" not in NAMES]


@pytest.mark.parametrize("name", FACES)
def test_what_a_package_names_is_there(name):
    assert missing(name, FACES[name]) == []


def test_a_name_of_nothing_is_seen(tmp_path):
    face = tmp_path / "__init__.py"
    face.write_text(
        "from spectral_paged.rope import RotaryTable\n__all__ = ['RotaryTable', 'run']\n"
    )
    assert missing("benchmarks.unsloth", face) == []
    assert missing("cache", face) == ["run"]


def private_names(source: str, importer: str, package: str) -> list[str]:
    """What a module takes from another package that is in no `__all__` on the way there."""
    found = []
    for name in ours(source, package):
        pieces = name.split(".")
        if pieces[0] == importer.split(".")[0]:
            continue  # the folders of one package know each other
        for depth in range(1, len(pieces)):
            face = ".".join(pieces[:depth])
            if face not in PUBLIC:
                break  # a module: what it defines is public with it, but for a leading underscore
            inside = covers(face, importer)
            if not inside and pieces[depth] not in (PUBLIC[face] or ()):
                found.append(name)
                break
        if pieces[-1].startswith("_") and not pieces[-1].startswith("__"):
            found.append(name)
    return sorted(found)


@pytest.mark.parametrize("module", BY_PATH)
def test_only_what_a_package_names_is_used_outside_of_it(module):
    assert private_names(module.path.read_text(), module.name, module.package) == []


def test_a_private_name_is_seen():
    source = "from spectral_paged.cache.prefix import PrefixChain"
    assert private_names(source, "engine.engine", "spectral_paged.engine")
    assert private_names(source, "cache.cache", "spectral_paged.cache") == []


INSIDE = {"groups", "sealer", "attention", "ops", "open_step", "replayed", "counters"}


def reaches(source: str) -> list[str]:
    """Reads of what a cache is made of, on anything that is called a cache."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in INSIDE:
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name.endswith("cache"):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", BY_PATH)
def test_only_the_cache_knows_what_it_is_made_of(module):
    if not covers("cache", module.name):
        assert reaches(module.path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "self.cache.sealer.warm_up(group)",
        "cache.sealer = other",
        "len(self.kv_cache.groups)",
        "llm.cache.open_step.plan",
        "def f(self):\n    self._cache.attention.run = 1",
    ],
)
def test_a_reach_through_the_facade_is_seen(source):
    assert reaches(source)


def test_what_a_cache_offers_is_no_reach():
    assert reaches("cache.num_bytes; cache.stats(); row.groups; page_ops.ops") == []


def test_benchmarks_are_imported_by_bench_alone():
    for module in MODULES:
        tree = ast.parse(module.path.read_text())
        if covers("benchmarks", module.name):
            continue
        functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
        benches = [f for f in functions if module.name == "cli.commands" and "bench" in f.name]
        inside = [node for f in benches for node in ast.walk(f)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside:
                names = imports(ast.Module([node], []), module.package)
                assert not any(covers("spectral_paged.benchmarks", n) for n in names), module.name


@pytest.mark.parametrize("module", ["scheduler.scheduler", "pool.slot_pool"])
def test_bookkeeping_loads_without_torch(module):
    """A package's `__init__` may import torch, so its folder is loaded as a bare package."""
    folder, name = module.split(".")
    code = (
        "import sys, types\n"
        f"root = {str(ROOT)!r}\n"
        "for folder in 'spectral_paged', 'scheduler', 'spectral_paged/pool':\n"
        "    name = folder.replace('/', '.').replace('scheduler', 'spectral_paged.scheduler')\n"
        "    sys.modules[name] = module = types.ModuleType(name)\n"
        "    module.__path__ = [f'{root}/{folder}']\n"
        f"import spectral_paged.{folder}.{name}\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "part, outside",
    [("kernels", {"transformers"}), ("scheduler", {"torch", "numpy", "transformers"})],
)
def test_leaf_packages_know_their_own_world_only(part, outside):
    for path in SOURCES[f"spectral_paged.{part}"].rglob("*.py"):
        roots = {n.split(".")[0] for n in imports(ast.parse(path.read_text()), "spectral_paged")}
        assert not roots & outside, path


def test_the_package_has_few_root_modules():
    assert len(list((ROOT / "spectral_paged").glob("*.py"))) <= 8


@pytest.mark.parametrize("module", BY_PATH)
def test_files_can_be_held_in_the_head(module):
    assert len(module.path.read_text().splitlines()) <= 450
    assert module.path.stem not in ("utils", "helpers", "misc", "common")


TEST_FILES = sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_no_test_imports_a_test(path):
    names = imports(ast.parse(path.read_text()), "tests")
    stems = {p.stem for p in TEST_FILES if p.stem.startswith("test_")}
    assert not {n.split(".")[0] for n in names} & stems


def test_only_tests_of_benchmarks_import_benchmarks():
    users = {
        str(path.relative_to(TESTS))
        for path in TEST_FILES
        if path.parent.name != "benchmarks"
        and path.stem != "copying_replay"  # a world for the tests of `bench quality` alone
        and any(covers("benchmarks", n) for n in ours(path.read_text(), "tests"))
    }
    assert users == set()
