"""Options of commands: each explains itself, is declared once, and has vLLM's names."""

from __future__ import annotations

import argparse
import dataclasses
import re

import pytest
import torch

from spectral_paged.cli.commands import build_parser, main
from spectral_paged.cli.generate import SAMPLING
from spectral_paged.device import choose_dtype
from spectral_paged.options import (
    NOT_SERVED,
    PAGE,
    TAKEN,
    CacheOptions,
    EngineArgs,
    LLMOptions,
    add_options,
    given_options,
    num_tokens,
    option,
    option_fields,
    parse_bytes,
    with_dashes,
)
from spectral_paged.sampling import SamplingParams
from spectral_paged.server.command import settings_of
from spectral_paged.server.settings import ServerSettings
from support.paths import ROOT

# fields that are no options: what they bound is bounded for everybody
OF_THE_LIBRARY = {
    "max_stops",
    "max_stop_chars",
    "max_token_rules",
    "max_salt_chars",
    "body_seconds",
    "send_seconds",
    "retry_seconds",
}
COMMANDS_WITH_AN_LLM = ("serve", "generate", "prefill")


def parsers(parser, name="spectral-paged"):
    """Every parser below one, by the words that lead to it."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from parsers(inner, f"{name} {word}")


PARSER = build_parser()
PARSERS = dict(parsers(PARSER))


def options(parser):
    """The options that a parser shows, but for those that print and end."""
    ends = {"--help", "--version"}
    return [
        action
        for action in parser._actions
        if action.help is not argparse.SUPPRESS and not ends & set(action.option_strings)
    ]


def one_line(text):
    return " ".join(re.sub(r"-\n +", "-", text).split())


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_says_what_it_does_and_its_default(name):
    parser = PARSERS[name]
    shown = one_line(parser.format_help())
    for action in options(parser):
        if isinstance(action, argparse._SubParsersAction):
            assert all(choice.help for choice in action._choices_actions)
            continue
        assert action.help and len(action.help) > 5, action
        said = parser._get_formatter()._expand_help(action)
        assert one_line(said) in shown
        if action.option_strings and not action.required:
            assert len(re.findall(r"\bdefaults?\b", said)) >= 1, said
            assert said.count("(default") <= 1 and "None" not in said, said


def test_a_default_is_shown_as_it_is_written():
    shown = one_line(PARSERS["spectral-paged serve"].format_help())
    for text in [
        "most sequences in the cache at a time (default: 256)",
        "most bytes of a body (default: 8MiB)",
        "(default: 0.9)",
        "common prefix. Must be off if `prefill_segment` is 0 (default: on)",
        "stale read shows (default: off)",
        "the signal to stop (default: 30)",
    ]:
        assert text in shown


@pytest.mark.parametrize("command", COMMANDS_WITH_AN_LLM)
def test_every_field_is_an_option_of_a_command_that_loads_a_model(command):
    found = {action.dest for action in options(PARSERS[f"spectral-paged {command}"])}
    assert {field.name for field in dataclasses.fields(LLMOptions)} <= found
    if command == "serve":
        fields = {field.name for field in dataclasses.fields(ServerSettings)}
        assert fields - found == OF_THE_LIBRARY


def test_a_field_has_the_same_names_and_reader_at_every_command():
    ours = {field.name for field in option_fields(LLMOptions)}
    found = {}
    for name, parser in PARSERS.items():
        for action in options(parser):
            if action.dest in ours:
                kind = (tuple(action.option_strings), action.type)
                found.setdefault(action.dest, {}).setdefault(kind, []).append(name)
    assert {dest: kinds for dest, kinds in found.items() if len(kinds) > 1} == {}
    assert found.keys() == ours and len(found["max_num_seqs"].popitem()[1]) == 7


def test_an_option_is_that_of_a_field_or_of_no_field():
    """No command has an option that is called like a field and means something else."""
    names = {}
    for field in option_fields(LLMOptions):
        for action in PARSERS["spectral-paged serve"]._actions:
            if action.dest == field.name:
                names |= dict.fromkeys(action.option_strings, field.name)
    for parser in PARSERS.values():
        for action in options(parser):
            for string in set(action.option_strings) & names.keys():
                format_list = action.dest == "format" and string == "--kv-format"
                assert action.dest == names[string] or format_list


def test_defaults_are_those_of_the_dataclasses():
    args = build_parser().parse_args(["serve", "tiny"])
    assert given_options(args, LLMOptions) == given_options(args, ServerSettings) == {}
    assert settings_of(args) == ServerSettings(("tiny",))


def test_sampling_options_are_parameters():
    fields = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for name, (kind, text) in SAMPLING.items():
        assert name in fields
        if fields[name] is not None:
            assert kind(text.split()[-1]) == fields[name]


def test_an_attribute_without_words_has_no_help_and_a_percent_is_one():
    @dataclasses.dataclass
    class Base:
        """A base.

        Attributes:
            share: at most 50% of it,
                however long.
        """

        share: int = dataclasses.field(default=5, metadata=option(int))
        hidden: int = 3

    @dataclasses.dataclass
    class Derived(Base):
        """A class with a field that says nothing."""

        silent: str | None = dataclasses.field(default=None, metadata=option(name="--quiet"))

    parser = argparse.ArgumentParser()
    add_options(parser, Derived)
    shown = one_line(parser.format_help())
    assert "--share SHARE at most 50% of it, however long (default: 5)" in shown
    assert "--hidden" not in shown and parser.parse_args([]) == argparse.Namespace()
    assert given_options(parser.parse_args(["--quiet", "x"]), Derived) == {"silent": "x"}


# ---- vLLM's names and numbers ---------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS_WITH_AN_LLM)
@pytest.mark.parametrize(
    "words, field, value",
    [
        ("--kv-cache-memory-bytes 2GiB", "kv_cache_bytes", 2 << 30),
        ("--kv-cache-memory-bytes 16g", "kv_cache_bytes", 16 * 10**9),
        ("--kv-cache-memory-bytes 25.6k", "kv_cache_bytes", 25600),
        ("--no-enable-prefix-caching", "enable_prefix_caching", False),
        ("--no-prefix-caching", "enable_prefix_caching", False),
        ("--enable-prefix-caching", "enable_prefix_caching", True),
        ("--max-model-len 32k", "max_model_len", 32_000),
        ("--max-model-len 32K", "max_model_len", 32_768),
        ("--max-model-len 1M", "max_model_len", 1 << 20),
        ("--max_model_len=25.6k", "max_model_len", 25_600),
        ("--max-num-batched-tokens 8K", "max_num_batched_tokens", 8192),
        ("--max-num-seqs 7", "max_num_seqs", 7),
        ("--gpu-memory-utilization 0.5", "gpu_memory_utilization", 0.5),
        ("--dtype half", "dtype", "half"),
        ("--quantization fp8", "quantization", "fp8"),
        ("-q fp8", "quantization", "fp8"),
        ("--quantization gguf", "quantization", None),
        ("--seed 3", "seed", 3),
        ("--enforce-eager", "enforce_eager", True),
        ("--no-async-scheduling", "async_scheduling", False),
        ("--generation-config vllm", "generation_config", "none"),
        ("--kv-cache-dtype-skip-layers 0 5", "exempt_layers", [0, 5]),
        ("--trust-remote-code", "trust_remote_code", True),
    ],
)
def test_names_and_numbers_of_vllm_are_understood(command, words, field, value):
    first = {"serve": ["tiny"], "generate": ["-i", "a", "-o", "b"], "prefill": ["-i", "a"]}[command]
    args = build_parser().parse_args(with_dashes([command, *first, *words.split()]))
    assert given_options(args, LLMOptions) == {field: value}


@pytest.mark.parametrize(
    "given, same",
    [
        ({"quantization": "gguf"}, {}),
        ({"generation_config": "vllm"}, {"generation_config": "none"}),
        ({"kv_cache_memory_bytes": 2 << 30}, {"kv_cache_bytes": 2 << 30}),
        ({"kv_cache_dtype_skip_layers": [0, 5]}, {"exempt_layers": [0, 5]}),
        ({"prefix_caching": False}, {"enable_prefix_caching": False}),
    ],
    ids=str,
)
def test_names_and_values_of_vllm_are_understood_in_a_call_as_in_a_command(given, same):
    assert EngineArgs("m", **given) == EngineArgs("m", **same)


@pytest.mark.parametrize(
    "word, dtype",
    [
        ("half", torch.float16),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float", torch.float32),
        ("float32", torch.float32),
        ("auto", torch.float32),
    ],
)
def test_vllms_words_for_a_dtype_are_understood(word, dtype):
    assert choose_dtype(word, torch.device("cpu")) is dtype


def test_vllms_names_of_the_server_are_understood():
    words = "serve tiny --served-model-name a b --api-key k l --api-key m --shutdown-timeout 4"
    settings = settings_of(build_parser().parse_args(words.split()))
    assert settings == ServerSettings(("a", "b"), api_keys=("k", "l", "m"), grace_seconds=4)
    args = build_parser().parse_args(["generate", "--input-file", "a", "--output-file", "b"])
    assert (str(args.input), str(args.output)) == ("a", "b")


@pytest.mark.parametrize("text", ["", "0", "-1", "auto", "1.5", "0.3K", "32KiB", "4 k k", "1e3"])
def test_no_number_of_tokens(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write a whole number of at least 1"):
        num_tokens(text)


@pytest.mark.parametrize("text, value", [("1.5K", 1536), (" 7 ", 7), ("0.5m", 500_000)])
def test_numbers_of_tokens(text, value):
    assert num_tokens(text) == value


def test_units_of_bytes_are_powers_of_1024_but_for_a_small_letter_alone():
    for power, letter in enumerate("kmgt", 1):
        assert parse_bytes(f"3{letter}") == 3 * 1000**power
        for unit in (letter.upper(), f"{letter}b", f"{letter}ib", f"{letter.upper()}iB"):
            assert parse_bytes(f"3{unit}") == 3 * 1024**power


def test_underscores_of_names_are_dashes_and_values_stay():
    words = ["serve", "a_b", "--max_model_len=4_0", "--api-key", "x_y", "-_", "--", "__"]
    assert with_dashes(words) == [
        "serve",
        "a_b",
        "--max-model-len=4_0",
        "--api-key",
        "x_y",
        "-_",
        "--",
        "__",
    ]


# ---- what vLLM has and this has not ---------------------------------------------------------

REFUSED = [
    pytest.param(name, neutral, instead, id=name)
    for instead, names in NOT_SERVED.items()
    for string, neutral in names.items()
    for name in string.split()
]


def outcome(capsys, words):
    """The message of the command line for `words`, or "" if it takes them."""
    try:
        PARSER.parse_args(words)
    except SystemExit as exit:
        assert exit.code == 2
        return capsys.readouterr().err
    return ""


@pytest.mark.parametrize("name, neutral, instead", REFUSED)
def test_an_option_that_is_not_served_is_refused_with_what_to_do(name, neutral, instead, capsys):
    line = ["serve", "tiny"]
    if neutral in ("on", "off"):
        off = f"--no-{name[2:]}" if name.startswith("--") else None
        wrong, right = ([off], [name]) if neutral == "on" else ([name], [off] if off else [])
    else:
        wrong, right = [name, "something"], []
        for value in neutral.split():
            assert outcome(capsys, [*line, name, value]) == ""
            assert outcome(capsys, [*line, f"{name}={value}"]) == "" or not name.startswith("--")
    message = one_line(outcome(capsys, [*line, *wrong]))
    assert f"error: {' '.join(wrong)} of vLLM is not served: {one_line(instead)}" in message
    assert f"({PAGE})" in message and "unrecognized" not in message
    assert outcome(capsys, [*line, *right]) == ""


@pytest.mark.parametrize("name", TAKEN)
def test_flags_that_ask_for_nothing_are_taken(name, capsys):
    for word in (name, f"--no-{name[2:]}"):
        assert outcome(capsys, ["serve", "tiny", word]) == ""
    for value in (True, False):
        assert EngineArgs("m", **{name[2:].replace("-", "_"): value}) == EngineArgs("m")


@pytest.mark.parametrize("command", ["generate -i a -o b", "bench throughput"])
def test_other_commands_with_vllms_options_refuse_them_too(command, capsys):
    line = command.split()
    message = outcome(capsys, [*line, "--tensor-parallel-size", "2"])
    assert "one process serves one model on one device" in one_line(message)
    assert outcome(capsys, [*line, "--tensor-parallel-size", "1", "--model", "x"]) == ""


def test_refusals_are_not_in_the_help_and_end_the_command(capsys):
    assert "tensor-parallel" not in PARSERS["spectral-paged serve"].format_help()
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "tiny", "--tensor_parallel_size", "2"])
    assert "--tensor-parallel-size 2 of vLLM is not served" in capsys.readouterr().err
    assert (ROOT / PAGE).exists()


def test_an_option_is_written_in_full(capsys):
    """A part of a name would mean another option as soon as a version adds one."""
    assert "unrecognized arguments: --max-num 3" in outcome(
        capsys, ["serve", "x", "--max-num", "3"]
    )


def test_an_object_of_options_serves_both_doors():
    given = LLMOptions(max_num_seqs=3, seed=5)
    assert CacheOptions.of(print, given, {"max_model_len": 9}) == CacheOptions(
        max_num_seqs=3, max_model_len=9
    )
    assert LLMOptions.of(print, CacheOptions(max_num_seqs=3), {"seed": 5}) == given
