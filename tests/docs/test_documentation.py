"""Examples in the documentation run, and the names in it exist."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import sys

import pytest
import torch
import yaml

import spectral_paged
from spectral_paged import LLM, CacheOptions, Engine
from spectral_paged.batch.file import read_lines
from spectral_paged.cli.commands import build_parser
from spectral_paged.models import calibration
from spectral_paged.options import LLMOptions
from support import markdown_pages, small_world
from support.lora_adapters import save_adapter
from support.markdown_pages import BY_NAME, MANUAL, PROJECT, ROOT, Block, commands, read

PARSER = build_parser()
EVERY_PAGE = pytest.mark.parametrize("page", BY_NAME.values(), ids=BY_NAME)
WITH_PYTHON = {n: p for n, p in BY_NAME.items() if any(b.language == "python" for b in p.blocks)}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PUBLIC = {name: getattr(spectral_paged, name) for name in spectral_paged.__all__}
PUBLIC |= {"llm": LLM, "engine": Engine}
FOLDERS = r"benchmarks|docs|examples|kernels|scheduler|spectral_paged|tests|\.ci|\.github"
EXAMPLE_FILES = (ROOT / "examples").glob("*.py")
OTHERS_OPTIONS = {"--no-deps", "--attention-backend", "--kv-cache-dtype"}  # pip's and vLLM's


# ---- what runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that pages speak of."""
    folder = tmp_path_factory.mktemp("documentation") / "work"
    folder.mkdir()
    loaded = small_world.load_model("any", device="cpu", dtype=torch.float32)
    basis = calibration.calibrate(loaded, [calibration.builtin_text()], max_spans=1)
    basis.save(folder / "spectral_basis.safetensors")
    save_adapter(folder / "adapters" / "sql", model=small_world.model())
    return folder


@pytest.fixture
def world(workplace, monkeypatch):
    small_world.enter(monkeypatch, workplace)
    return workplace


def run(page):
    """Run a page's Python blocks in order, in one namespace; those not to be run are compiled."""
    names = small_world.names()
    uses = {name for b in page.blocks for name in re.findall(r"\w+", b.text)}
    for name in ("llm", "another"):
        if name in uses:
            names[name] = LLM(kv_format="spectral-page", kv_cache_bytes=64 << 20)
    for block in page.blocks:
        if block.language == "python":
            # a traceback shows the line of the page
            code = compile("\n" * (block.line - 1) + block.text, str(page.path), "exec")
            if block.not_run is None:
                exec(code, names)
    return names


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_of_a_page_runs(name, world):
    names = run(WITH_PYTHON[name])
    if name == "docs/embedding.md":
        assert names["done"] == 700 and names["failed"] == {} and names["out"].isfinite().all()
        assert names["cache"].stats()["num_sequences"] == 0


@pytest.mark.parametrize(
    "text, error",
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```", AssertionError),
        ("<!-- not run: needs a GPU -->\n```python\nx = = 1\n```", SyntaxError),
        ("```python\nLLM(no_such_option=1)\n```", NameError),
    ],
)
def test_a_wrong_block_is_noticed(text, error, world):
    with pytest.raises(error):
        run(read(ROOT / "wrong.md", text))


def test_a_block_that_is_not_run_says_why():
    page = read(ROOT / "page.md", "<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n")
    assert [b.not_run for b in page.blocks] == ["needs a GPU"]
    assert run(page)
    page = read(ROOT / "page.md", "<!-- not run: -->\n```python\n1 / 0\n```\n")
    assert [b.not_run for b in page.blocks] == [None]


# what an example prints; one that is not named here prints something
EXAMPLES = {"embed_in_engine": r"pages_attended +[1-9]"}


# the demo has tests of its own
@pytest.mark.parametrize("name", sorted({p.stem for p in EXAMPLE_FILES} - {"demo"}))
def test_an_example_runs(name, world, monkeypatch, capsys):
    module = small_world.example(monkeypatch, name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    module.main()
    assert re.search(EXAMPLES.get(name, r"\w"), capsys.readouterr().out)


# ---- commands -------------------------------------------------------------------------------


def subparser(words):
    """The parser of the subcommand that `words` name, and the words that are left."""
    parser, words = PARSER, list(words)
    while words:
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not inner or words[0] not in inner[0].choices:
            break
        parser = inner[0].choices[words.pop(0)]
    return parser, words


def check_command(line):
    """Refuse a line that the command line would refuse; `...` stands for what it requires."""
    words = shlex.split(re.split(r" [|>&]", line)[0])[1:]
    parser, rest = subparser(words)
    takes_value = {o for a in parser._actions if a.nargs != 0 for o in a.option_strings}
    words = [
        "1" if w == "..." and before in takes_value else w for before, w in zip(["", *words], words)
    ]
    if "..." in words:
        at = words.index("...")
        required = [a for a in parser._actions if a.required or not a.option_strings]
        words[at : at + 1] = [w for a in required for w in [*a.option_strings[:1], "1"]]
    try:
        PARSER.parse_args(words)
    except SystemExit:
        raise AssertionError(f"the command line refuses: {line}") from None


def check_span(span):
    """A command in running text may leave out what it requires, but names nothing unknown."""
    words = [w for w in shlex.split(span)[1:] if w != "..."]
    parser, rest = subparser(words)
    known = {option for action in parser._actions for option in action.option_strings}
    for word in rest:
        assert not word.startswith("--") or word.split("=")[0] in known, f"{span}: {word}"
    nested = any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)
    assert not (nested and rest and re.fullmatch("[a-z]+", rest[0])), f"{span}: no such command"


@EVERY_PAGE
def test_commands_parse(page):
    for block in page.blocks:
        for line in commands(block):
            check_command(line)
    for span in page.spans:
        if span.startswith("spectral-paged ") and "|" not in span:
            check_span(span)


@pytest.mark.parametrize(
    "line",
    [
        "spectral-paged generate --input in.jsonl",
        "spectral-paged generate ... --no-such-option",
        "spectral-paged bench encode",
        "spectral-paged info",
    ],
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises(AssertionError):
        check_command(line)


@pytest.mark.parametrize("span", ["spectral-paged encode", "spectral-paged bench seal --fast"])
def test_a_wrong_command_in_running_text_is_noticed(span):
    with pytest.raises(AssertionError):
        check_span(span)


def test_commands_of_a_block_are_found():
    text = "make demo\nspectral-paged generate ... \\\n    --top  # live\n$ spectral-paged info X\n"
    found = commands(Block(1, "", text, None))
    assert found == ["spectral-paged generate ...  --top", "spectral-paged info X"]


@EVERY_PAGE
def test_make_targets_exist(page):
    said = [*page.spans, *(line for b in page.blocks for line in b.text.splitlines())]
    for line in said:
        found = re.match(r"(?:[A-Z]+=\S+ )*make ([a-z-]+)\b", line)
        assert not found or re.search(rf"^{found[1]}:", MAKEFILE, re.M), line


@EVERY_PAGE
def test_lines_of_a_batch_are_read(page, tmp_path):
    for block in page.blocks:
        if block.language == "json":
            (tmp_path / "in.jsonl").write_text(block.text, encoding="utf-8")
            for line in read_lines(tmp_path / "in.jsonl", {}):
                assert line.error is None


# ---- links ----------------------------------------------------------------------------------


def broken_links(page):
    for target in page.links:
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        anchored = anchor and path.suffix == ".md"
        if not path.exists() or (anchored and anchor not in read(path).anchors):
            yield target


@EVERY_PAGE
def test_links_and_anchors_resolve(page):
    assert list(broken_links(page)) == []


def test_a_broken_link_is_noticed():
    text = "# A heading\n[a](README.md#no-such-heading) [b](no/such/file.md) [c](#a-heading)"
    links = list(broken_links(read(ROOT / "page.md", text)))
    assert links == ["README.md#no-such-heading", "no/such/file.md"] or links == [
        "README.md#no-such-heading",
        "no/such/file.md",
        "#a-heading",
    ]


def menu(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from menu(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_menu_and_only_those():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {str(p.relative_to(ROOT / "docs")) for p in MANUAL if p.name != "README.md"}
    assert set(menu(config["nav"])) == pages


# ---- names ----------------------------------------------------------------------------------


def resolves(dotted):
    """Whether a dotted name of the package is a module or something in one."""
    pieces = dotted.split(".")
    for cut in range(len(pieces), 0, -1):
        try:
            found = importlib.import_module(".".join(pieces[:cut]))
        except ModuleNotFoundError:
            continue
        for piece in pieces[cut:]:
            if not hasattr(found, piece):
                return False
            found = getattr(found, piece)
        return True
    return False


def all_options(parser):
    options = set()
    for action in parser._actions:
        options |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                options |= all_options(inner)
    return options


def strangers(span):
    """What a code span names that does not exist."""
    for dotted in re.findall(r"\bspectral_paged(?:\.\w+)+\b(?!/)", span):
        if not resolves(dotted) and not (ROOT / dotted).exists():
            yield dotted
    for path in re.findall(rf"(?<![\w/.=-])(?:{FOLDERS})/[\w./*-]+", span):
        if not list(ROOT.glob(path.rstrip("/"))):
            yield path
    if span.startswith("--"):
        option = re.split(r"[ =]", span)[0]
        if option not in all_options(PARSER) | OTHERS_OPTIONS:
            yield option
    yield from wrong_keywords(span)


def wrong_keywords(span):
    """Keywords of a call of a public name that it does not take."""
    try:
        call = ast.parse(span, mode="eval").body
    except SyntaxError:
        return
    if not isinstance(call, ast.Call):
        return
    name = ast.unparse(call.func)
    first, *rest = name.split(".")
    owner = PUBLIC.get(first) if len(rest) < 2 else None
    target = getattr(owner, rest[0], None) if rest else owner
    if owner is not None and target is None:
        yield name
    elif target is not None:
        takes = set(inspect.signature(target).parameters)
        if "options" in takes:  # `**options`: those of a cache, by name
            options = LLMOptions if target is LLM else CacheOptions
            takes |= {field.name for field in dataclasses.fields(options)}
        yield from (f"{name}({k.arg}=)" for k in call.keywords if k.arg not in (None, *takes))


@EVERY_PAGE
def test_what_is_named_exists(page):
    spans = [*page.spans, *re.findall(r"^::: (\S+)$", page.text, re.M)]
    assert [s for span in spans for s in strangers(span)] == []


@pytest.mark.parametrize("path", PROJECT, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_contributors_are_sent_to_exist(path):
    """In fenced blocks and plain text too; what `T=` names is a test."""
    text = path.read_text(encoding="utf-8")
    assert list(strangers(re.sub("^--.*", "", text))) == []
    for name in re.findall(r"make test-one T=([\w/.]+?)[.,]?(?=[\s`;:,)]|$)", text):
        assert name == "..." or (ROOT / "tests" / name).exists(), name


@EVERY_PAGE
def test_figures_that_are_read_exist(page, world):
    asked = set(re.findall(r"stats(?:\(\))?\[\"(\w+)\"\]", page.text))
    if asked:
        llm = LLM(kv_format="spectral-page", kv_cache_bytes=64 << 20)
        assert asked - set(llm.stats()) == set()


@pytest.mark.parametrize(
    "span",
    [
        "spectral_paged.cache.cache.NoSuchCache",
        "spectral_paged/no_such_file.py",
        ".github/no_such_form.yml",
        "benchmarks/results/no-such-*.json",
        "--no-such-option",
        "LLM(MODEL, no_such_option=True)",
        "LLM.no_such_method(1)",
        "llm.no_such_method()",
    ],
)
def test_a_name_of_nothing_is_noticed(span):
    assert list(strangers(span))


@pytest.mark.parametrize(
    "span", ["spectral_paged.cache.SpectralKVCache", "LLM(MODEL, max_num_seqs=2)"]
)
def test_a_name_of_something_is_not(span):
    assert not list(strangers(span))


def test_pages_are_read_as_they_are_shown():
    assert markdown_pages.slug("What a page is made of, and what decided it") == (
        "what-a-page-is-made-of-and-what-decided-it"
    )
