"""Files for contributors, such as guide, forms, hooks and licence, agree with the repository."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from support.paths import ROOT, TESTS

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
BANS = [h for repo in HOOKS["repos"] for h in repo["hooks"] if h.get("language") == "pygrep"]
FORMS = {path.stem: path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")}
CODE = ("spectral_paged", "kernels", "scheduler", "benchmarks", "examples", "tests")


def test_the_guide_is_short_and_its_tree_is_that_of_the_packages():
    assert len(GUIDE.splitlines()) <= 150
    said = set(re.findall(r"^(\w+(?:/\w+)?)/ {2,}\w|^(spectral_paged/integrations)/ ", GUIDE, re.M))
    inside = {p.parent.name for p in (ROOT / "spectral_paged").glob("*/__init__.py")}
    folders = {f"spectral_paged/{name}" for name in inside}
    assert {one or two for one, two in said} == folders | {*CODE, "docs"} - {"examples"}


def test_every_helper_of_the_tests_is_explained():
    table = (TESTS / "support" / "README.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\|.*", table, re.M))))
    modules = {p.stem for p in (TESTS / "support").glob("*.py") if not p.stem.startswith("__")}
    assert modules - said == set()


@pytest.mark.parametrize("name", ["bug", "format-or-model", "performance"])
def test_a_form_asks_for_something(name):
    form = yaml.safe_load(FORMS[name].read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    fields = [f for f in form["body"] if f["type"] != "markdown"]
    assert len({f["id"] for f in fields}) == len(fields) >= 3
    assert all(f["attributes"]["label"] for f in fields)
    assert all(f["attributes"]["options"] for f in fields if f["type"] == "dropdown")


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("bug", ["`spectral-paged info`", "`llm.stats()`"]),
        ("performance", ["The JSON of `spectral-paged bench steps`", "`llm.stats()`"]),
    ],
)
def test_a_form_asks_for_what_tells_causes_apart(name, wanted):
    form = yaml.safe_load(FORMS[name].read_text(encoding="utf-8"))
    labels = " ".join(f["attributes"]["label"] for f in form["body"])
    assert all(text in labels for text in wanted)


@pytest.mark.parametrize("ban", BANS, ids=lambda ban: ban["id"])
def test_what_hooks_ban_is_nowhere(ban):
    """But in this file, which shows what they find."""
    exclude = re.compile(ban.get("exclude", r"\A\b\B"))
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if path.name != "test_project_files.py" and not exclude.search(name):
                text = path.read_text(encoding="utf-8")
                assert not any(re.search(ban["entry"], line) for line in text.splitlines()), name


@pytest.mark.parametrize(
    "line, found",
    [
        ("x = [1,2]  # fmt: skip", "no-fmt-skip"),
        ("    except:", "no-bare-except"),
        ("    except ValueError:", None),
        ("# TODO: faster", "todo-has-a-link"),
        ("# TODO https://example.org/issues/1: faster", None),
        ("    breakpoint()", "no-breakpoint"),
    ],
)
def test_a_hook_finds_what_it_bans(line, found):
    assert [ban["id"] for ban in BANS if re.search(ban["entry"], line)] == (
        [found] if found else []
    )


def test_hooks_format_with_the_pinned_ruff():
    [hook] = [repo for repo in HOOKS["repos"] if repo["repo"].endswith("ruff-pre-commit")]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ruff=={hook['rev'].removeprefix('v')}" in pins


INSTALLED_BY_NAME = re.compile(
    r"""pip install( +-\S+)* +['"]?spectral[-_]paged|spectral[-_]paged\["""
)
WRITTEN = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")),
    *(ROOT / ".ci" / name for name in ("audit", "pins", "run")),
    *(path for name in ("docs", ".github") for path in (ROOT / name).rglob("*.md")),
    *(path for name in CODE for path in (ROOT / name).rglob("*.py")),
]


def test_the_package_is_installed_from_a_checkout():
    """No index has it by its name, and another's package may take it; extras exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for path in WRITTEN:
        text = path.read_text(encoding="utf-8")
        assert not [line for line in text.splitlines() if INSTALLED_BY_NAME.search(line)], path
        for extras in re.findall(r"""['"]\.\[([a-z,-]+)\]['"]""", text):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), path


@pytest.mark.parametrize(
    "line",
    [
        "pip install 'spectral{}paged[server]'",
        "pip install spectral{}paged",
        "python -m pip install -U 'spectral{}paged'",
        "needs `spectral{}paged[top]`",
    ],
)
def test_an_install_by_name_is_seen(line):
    assert INSTALLED_BY_NAME.search(line.format("-"))
    assert INSTALLED_BY_NAME.search(line.format("_"))
    assert not INSTALLED_BY_NAME.search("pip install '.[server]'; spectral-paged serve")


def test_the_licence_that_is_declared_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [name] = project["license-files"]
    text = (ROOT / name).read_text(encoding="utf-8").split()
    assert project["license"] == "Apache-2.0" and text[:4] == [
        "Apache",
        "License",
        "Version",
        "2.0,",
    ]


def test_quick_tests_exist_and_targets_are_phony():
    quick = MAKEFILE.split("QUICK := ")[1].split("\n\n")[0].replace("\\", "").split()
    assert len(quick) >= 5 and all((ROOT / path).exists() for path in quick)
    phony = MAKEFILE.split(".PHONY: ")[1].split("\n")[0].split()
    assert set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M)) == set(phony)
