"""Figures in the documentation are those of stored reports: speed, memory, costs, recall."""

from __future__ import annotations

import json
import re

import pytest

from support.markdown_pages import BY_NAME, ROOT, rows, table


def stored(name):
    """A stored result by the name of its file."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def by_backend(name):
    return {row["backend"]: row for row in stored(name)["rows"]}


def gains(workload, figure):
    """How often more `spectral-quality` has of a figure than `exact` in a stored result."""
    rows_of = by_backend(f"throughput-8b-{workload}")
    return rows_of["spectral-quality"][figure] / rows_of["exact"][figure]


def test_gains_are_those_of_the_stored_results():
    said = {row[0]: row[1] for row in rows(BY_NAME["docs/tuning.md"]) if len(row) == 2}
    decode, output = "decode_tokens_per_second", "output_tokens_per_second"
    full = gains("32k-full", "num_requests"), gains("32k-full", decode)
    assert said["32K contexts, memory full"] == (
        "{:.2f}x the sequences, {:.2f}x the decode tokens/s".format(*full)
    )
    assert f"{gains('8k-24gb', decode):.2f}x the decode" in said["8K contexts, 24 GB for all"]
    assert said["1,024 in, 256 out"].startswith(f"{gains('h100-1k', output):.2f}x")
    assert said["128 to 384 in, 512 to 1,536 out"] == f"{gains('h100-mixed', output):.2f}x"
    assert f"{full[1]:.2f} times the decode tokens" in BY_NAME["docs/index.md"].text
    for number in (f"({full[0]:.2f}x)", f"({full[1]:.2f}x)", f"{gains('h100-mixed', output):.2f}x"):
        assert number in BY_NAME["README.md"].text and number in BY_NAME["docs/speed.md"].text


OUTPUT, DECODE = "output_tokens_per_second", "decode_tokens_per_second"
PRESETS_OF_PAGES = "exact", "spectral-quality", "spectral-int8-post"


def figures(found, key, backends):
    """Cells of a row: the first backend's figure, others with how often more they are."""
    first, *others = (found[backend][key] for backend in backends)
    return [f"{first:,.0f}", *(f"{other:,.0f} ({other / first:.2f}x)" for other in others)]


@pytest.mark.parametrize("page", ["docs/speed.md", "docs/unsloth.md"])
def test_a_result_is_named_with_its_commit(page):
    """In the paragraph that names it, or in one before it under the same heading."""
    named = []
    for section in re.split(r"^#+ ", BY_NAME[page].prose, flags=re.M):
        for name in re.findall(
            r"`benchmarks/results/((?:throughput|steps|unsloth)-[\w.-]+)\.json`", section
        ):
            commit = stored(name)["environment"]["commit"]
            assert commit in section, f"{name}: {commit}"
            named.append(name)
    assert len(named) >= 3


def test_the_mixed_workload_is_as_stored():
    found = by_backend("throughput-8b-h100-mixed")
    lines = rows(BY_NAME["docs/speed.md"])
    [first] = [i for i, row in enumerate(lines) if row[0].startswith("mixed: ")]
    said = lines[first : first + 2]
    two = PRESETS_OF_PAGES[:2]
    assert said[0][2:4] == figures(found, OUTPUT, two)
    gaps = [found[backend]["itl_ms"] for backend in two]
    assert said[1][2:4] == [f"{gap['p99']:.1f} / {gap['max']:.0f} ms" for gap in gaps]
    for backend in two:
        assert f"{found[backend][DECODE]:,.0f}" in BY_NAME["docs/speed.md"].text
    notes = " ".join(BY_NAME["docs/lab-notes.md"].text.split())
    assert f"is {gaps[1]['max']:.0f} ms at a429369" in notes


def test_a_7b_shape_is_as_stored():
    found = by_backend("throughput-7b-h100-32k-full")
    header = ["32K contexts, memory full, decode alone", "`exact` (bf16)"]
    said = table("docs/speed.md", [*header, *(f"`{b}`" for b in PRESETS_OF_PAGES[1:])])
    stats = {backend: row["stats"] for backend, row in found.items()}
    assert [row[1:] for row in said] == [
        figures(stats, "most_running", PRESETS_OF_PAGES),
        figures(found, DECODE, PRESETS_OF_PAGES),
        figures(found, OUTPUT, PRESETS_OF_PAGES),
        [str(stats[backend]["preemptions"]) for backend in PRESETS_OF_PAGES],
    ]


def test_transformers_beside_the_engine_is_as_stored():
    found = by_backend("throughput-8b-h100-small")
    header = ["", "output tokens/s", "over `generate`", "over continuous batching"]
    said = table("docs/speed.md", header)
    rates = [row[OUTPUT] for row in found.values()]
    generate, continuous = (found[f"transformers{kind}"][OUTPUT] for kind in ("", "-continuous"))
    assert [row[1:] for row in said] == [
        [f"{rate:,.0f}", f"{rate / generate:.2f}x", f"{rate / continuous:.2f}x"] for rate in rates
    ]
    for rate in rates:
        assert f" {rate:,.0f}" in BY_NAME["README.md"].text


def test_a_small_model_is_as_stored():
    long, short = (by_backend(f"throughput-smollm2-135m-h100{size}") for size in ("", "-small"))
    three = "exact", "spectral-quality", "spectral-compact"
    said = table(
        "docs/speed.md", ["workload", "", "`exact` (bf16)", *(f"`{b}`" for b in three[1:])]
    )
    assert [row[2:] for row in said[:2]] == [figures(long, key, three) for key in (OUTPUT, DECODE)]
    assert [row[2:4] for row in said[3:5]] == [
        figures(short, key, three[:2]) for key in (OUTPUT, DECODE)
    ]
    first, *others = (long[backend]["stats"]["bytes_per_token"] for backend in three)
    assert said[2][2:] == [
        f"{first:,.0f}",
        *(f"{other:,.0f} ({first / other:.1f}x less)" for other in others),
    ]
    held = [short[backend]["stats"]["bytes_per_token"] for backend in three[:2]]
    assert said[5][2:4] == [f"{one:,.0f}" for one in held]
    generate = short["transformers"][OUTPUT]
    exact, pages = (short[backend][OUTPUT] for backend in three[:2])
    text = " ".join(BY_NAME["docs/speed.md"].text.split())
    assert f"made {generate:.0f} output tokens/s of the second workload" in text
    assert f"`exact` {exact / generate:.1f} times as many" in text
    assert f"`spectral-quality` {pages / generate:.1f} times" in text
    medians = [short[backend]["itl_ms"]["p50"] for backend in three[:2]]
    assert "{1:.1f} ms instead of {0:.1f}".format(*medians) in text
    whole = long["spectral-quality"][OUTPUT] / long["exact"][OUTPUT]
    for page in ("README.md", "docs/formats.md"):
        assert (
            f"{whole:.2f}x" in BY_NAME[page].text and f"{pages / exact:.2f}x" in BY_NAME[page].text
        )
    decode = [long[b][DECODE] / long["exact"][DECODE] for b in three[1:]]
    decode.append(short["spectral-quality"][DECODE] / short["exact"][DECODE])
    assert f"({min(decode):.2f}x to {max(decode):.2f}x the" in BY_NAME["docs/tuning.md"].text


def steps_of(name, layers="compiled"):
    return [row for row in stored(name)["rows"] if row["layers"] == layers]


def test_what_a_step_is_made_of_is_as_stored():
    header = ["sequences x tokens", "", "step", "over the floor", "attention", "products", "seal"]
    said = table("docs/speed.md", [*header, "rest", "idle, of it between steps"])
    found = [*steps_of("steps-8b-short"), *steps_of("steps-8b-8k")]
    order = sorted(found, key=lambda row: (row["context"], row["batch"], row["format"]))
    assert [row[1:] for row in said] == [
        [
            f"`{row['format']}`",
            f"{row['step_ms']:.2f}",
            f"{row['over_floor']:.2f}x",
            *(f"{row['kinds'][kind]:.2f}" for kind in ("attention", "products", "seal", "rest")),
            f"{row['idle_share']:.1%}, {row['idle_between_steps_share']:.1%}".replace("%", " %"),
        ]
        for row in order
    ]
    sizes = list(dict.fromkeys(f"{row['batch']} x {row['context']}" for row in order))
    assert [row[0] for row in said[:6:2]] == sizes
    assert all(f"{row['kinds']['copies']:.2f}" == "0.01" for row in found)
    whole = stored("steps-8b-short")
    text = BY_NAME["docs/speed.md"].text
    assert f"({whole['weight_bytes'] / 1e9:.1f} GB)" in text
    assert (
        f"({whole['copy_bytes_per_second'] / 1e12:.2f} TB/s): {found[0]['floor_ms']:.2f} ms" in text
    )


def test_layers_of_a_step_are_as_stored():
    header = ["layers", "1 sequence", "128 sequences", "kernels a step, 1 / 128"]
    said = table("docs/speed.md", header)
    own = steps_of("steps-8b-layers")
    text = BY_NAME["docs/decisions/0021-layers-are-compiled-one-by-one.md"].text
    for row, layers in zip(said, ("compiled", "liger", "eager"), strict=True):
        found = steps_of("steps-8b-layers", layers)
        ratios = [one["step_ms"] / base["step_ms"] for one, base in zip(found, own, strict=True)]
        times = [f"{one['step_ms']:.2f}" for one in found]
        cells = [f"{ms} ms" for ms in times]
        if layers != "compiled":
            cells = [f"{c} ({ratio:.2f}x)" for c, ratio in zip(cells, ratios, strict=True)]
        kernels = " / ".join(f"{one['kernels_per_step']:,.0f}" for one in found)
        assert row[0].startswith(layers) and row[1:] == [*cells, kernels]
        assert all(re.search(rf"\b{ms}\b", text) for ms in times)
        assert layers != "liger" or [f"{ratio - 1:.0%}" for ratio in ratios] == ["1%", "2%"]


def test_the_profile_is_as_stored():
    found = by_backend("throughput-8b-h100-profile")
    sections = [*found["exact"]["breakdown_seconds"], "in all"]
    said = table("docs/speed.md", ["", *sections])
    assert said == [
        [
            f"`{backend}`",
            *(f"{s:.2f}" for s in [*row["breakdown_seconds"].values(), row["elapsed_time"]]),
        ]
        for backend, row in found.items()
    ]


def test_times_of_unsloth_are_as_stored():
    header = ["rows x tokens", "", "tokens/s", "GPU, ms a step", "attention, ms a step"]
    said, found = table("docs/unsloth.md", header), stored("unsloth-random-mistral-7b")["rows"]
    for row, real in zip(said, found, strict=True):
        if real["format"] == "unpatched":
            base = real
            assert row[0] == f"{real['num_rows']} x {real['prompt_tokens']:,}"
        rate, *spent = (
            real[key] for key in (DECODE, "kernel_ms_per_step", "attention_ms_per_step")
        )
        cells = [f"{rate:,.1f}", *(f"{ms:.2f}" for ms in spent)]
        if real is not base:
            better = [
                rate / base[DECODE],
                base["kernel_ms_per_step"] / spent[0],
                base["attention_ms_per_step"] / spent[1],
            ]
            cells = [f"{cell} ({ratio:.2f}x)" for cell, ratio in zip(cells, better, strict=True)]
        assert row[1].strip("`") == real["format"] and row[2:] == cells
    prompts = [f"{row['prompt_seconds']:.2f}" for row in found]
    text = " ".join(BY_NAME["docs/unsloth.md"].text.split())
    short = "takes {} s unpatched, {} in `exact`, {} in `spectral-int8` and {} in"
    assert short.format(*prompts[:4]) in text
    assert "and {}, {}, {} and {} s at 16 x 8,192".format(*prompts[4:]) in text
    held = [f"{row['bytes_per_token']:,.0f}" for row in found[:-4:-1]]
    assert (
        "{} bytes in `spectral-quality`, {} in `spectral-int8` and {} in `exact`".format(*held)
        in text
    )
    rates = [row[DECODE] for row in found]
    said = [f"{rate:.1f}" for rate in rates[:4]], [f"{rate:,.0f}" for rate in rates[4:]]
    for one in said:
        assert ", ".join(one) in BY_NAME["README.md"].text


def test_attention_at_width_64_is_as_stored():
    found = stored("decode-64")["rows"]
    header = ["heads", "sequences x tokens", "bf16", "FlashInfer bf16, fp8"]
    presets = "spectral-quality", "spectral-compact", "spectral-int8"
    said = table("docs/speed.md", [*header, *(f"`{name}`" for name in presets)])
    shapes = [shape for shape in ("smollm2-135m", "mha-64") for _ in range(4)]
    for (_, work, *cells), shape in zip(said, shapes, strict=True):
        own = [row for row in found if (row["shape"], row["work"]) == (shape, work)]
        best = min(row["ms"] for row in own if "bf16" in row["what"])

        def gains_of(name, part, own=own, best=best):
            [row] = [r for r in own if r["what"].startswith(name) and r["part"] == part]
            return f"{best / row['ms']:.2f}x"

        flash = [gains_of(f"flashinfer {kind}", "pages") for kind in ("bf16", "fp8")]
        assert cells == [
            f"{best:.3f} ms",
            ", ".join(flash),
            *(" / ".join(gains_of(f"{n} ", p) for p in ("pages", "attend")) for n in presets),
        ]


def test_prompts_of_8k_by_format_are_as_stored():
    found = by_backend("throughput-8b-h100-8k-formats")
    rates = [found[backend][OUTPUT] for backend in PRESETS_OF_PAGES]
    text = " ".join(BY_NAME["docs/speed.md"].text.split())
    assert f"make {rates[0]:,.0f} output tokens/s in `exact`" in text
    for backend, rate in zip(PRESETS_OF_PAGES[1:], rates[1:], strict=True):
        assert f"{rate:,.0f} ({rate / rates[0]:.2f}x) in `{backend}`" in text
    last = [found[backend]["ttft_ms"]["max"] / 1e3 for backend in PRESETS_OF_PAGES[1:]]
    assert "after {1:.1f} s where that of `spectral-quality` takes {0:.1f}".format(*last) in text


def test_costs_of_sealing_are_as_stored():
    result = stored("seal-cuda-h100")
    ms = {
        row["format"]: row["ms_per_block"]
        for row in result["rows"]
        if row["blocks"] == 1 and row["format"] not in ("spectral-quality", "spectral-compact")
    }
    text = " ".join(BY_NAME["docs/quality.md"].text.split())
    said = [f"`{name}` to {time:.1f}" for name, time in ms.items()]
    assert all(one in text for one in said)
    assert f"where the prefill takes {result['prefill_ms']:.1f}" in text
    shares = [f"{100 * time / result['prefill_ms']:.0f}" for time in ms.values()]
    assert "{}, {} and {} % of a prefill".format(*shares) in text
    assert f"kernel: {ms['spectral-int8']:.0f} ms a block" in BY_NAME["docs/formats.md"].text
    assert f"the same: {ms['spectral-page']:.0f} ms" in BY_NAME["docs/formats.md"].text


def test_needles_of_unsloth_are_as_stored():
    names = ("unsloth-needles-smollm2-135m", "unsloth-needles-smollm2-135m-fp32")
    found = [row for name in names for row in stored(name)["rows"]]
    header = ["", "", "recalled", "of those that unpatched recalls"]
    said = table("docs/unsloth.md", [*header, "answers that are unpatched's, token for token"])
    real = []
    for row in found:
        cells = [f"{row['recalled']} of {row['asked']}", "", ""]
        if row["format"] != "unpatched":
            cells[1:] = [
                f"{row['recalled_of_known']} of {row['known']}",
                f"{row['same_tokens']} of {row['asked']}",
            ]
        real.append([row["format"], *cells])
    assert [[row[1].strip("`"), *row[2:]] for row in said] == real


def test_steps_of_a_small_model_are_as_stored():
    pages, exact = steps_of("steps-smollm2-135m")
    assert (pages["format"], exact["format"]) == ("spectral-quality", "exact")
    busy = {f"{sum(row['kinds'].values()):.2f}" for row in (pages, exact)}
    text = " ".join(BY_NAME["docs/speed.md"].text.split())
    assert len(busy) == 1 and f"the same {busy.pop()} ms of kernels a step" in text
    said = "steps of {:.2f} ms in `exact` and {:.2f} in `spectral-quality`"
    assert said.format(exact["step_ms"], pages["step_ms"]) in text
    waits = [f"{100 * row['idle_between_steps_share']:.0f} %" for row in (exact, pages)]
    assert "for {} and {} of the time the GPU waits".format(*waits) in text


def test_prompts_are_as_fast_as_stored():
    found = stored("prompts-8b")
    alone = {}
    for row in found["attention"]:
        alone.setdefault((row["keys"], row["queries"]), {})[row["backend"]] = row
    said = rows(BY_NAME["docs/speed.md"])
    for (keys, queries), by in alone.items():
        cells = [
            f"{by[b]['ms']:.3f} ({by[b]['tflops_per_second']:.0f})"
            for b in ("fa3", "varlen", "cudnn")
        ]
        assert [f"{keys:,}", "all" if keys == queries else f"{queries:,}", *cells] in said
    for row in found["engine"]:
        share = row["seal_seconds"] / row["seconds"]
        assert [
            f"`{row['format']}`",
            f"{row['num_prompts']} x {row['input_len']:,}",
            f"{row['budget']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * share:.1f} %",
        ] in said
    slower = [by["varlen"]["ms"] / by["fa3"]["ms"] for by in alone.values()]
    beside = [by["cudnn"]["ms"] / by["fa3"]["ms"] for by in alone.values() if "cudnn" in by]
    text = BY_NAME["docs/decisions/0037-chunks-attend-by-flash-attention-3.md"].text
    for values, whose in ((slower, "torch's"), (beside, "cuDNN")):
        assert f"{min(values):.1f} to {max(values):.1f} times as fast as {whose}" in text


def test_answers_through_vllm_are_those_stored():
    """Needles and divergence of `bench served`, here and inside vLLM."""
    said = rows(BY_NAME["docs/vllm.md"])
    for name in ("served-smollm2-135m", "served-smollm2-135m-vllm"):
        for row in stored(name)["rows"]:
            cells = [
                f"`{row['backend']}`",
                f"{row['length']:,}",
                f"{row['recalled']}/{row['needles']}",
            ]
            first = row["backend"] == stored(name)["baseline"]
            kl = "-" if first else f"{row['kl']:.4f} +- {row['kl_standard_error']:.4f}"
            assert [*cells, kl] in said


CACHES = {
    "vllm": "vLLM's, bf16",
    "vllm:fp8": "vLLM's, fp8",
    "vllm-pages:spectral-quality": "pages, `spectral-quality`",
}


@pytest.mark.parametrize("workload", ["1k", "8k", "32k-full"])
def test_pages_in_vllm_are_as_fast_as_stored(workload):
    """The table of the page on vLLM, and what README says of it."""
    found = by_backend(f"throughput-8b-vllm-{workload}")
    said = {(row[1], *row[2:]) for row in rows(BY_NAME["docs/vllm.md"]) if len(row) == 5}

    def than(backend, figure, other):
        return f"{found[backend][figure] / found[other][figure]:.2f}x"

    for backend, name in CACHES.items():
        row, cells = found[backend], []
        for figure in (OUTPUT, DECODE):
            more = "" if backend == "vllm" else f" ({than(backend, figure, 'vllm')})"
            cells.append(f"{row[figure]:,.0f}{more}")
        assert (name, *cells, f"{row['stats']['capacity_sequences']:,}") in said
    text, page = (" ".join(BY_NAME[name].text.split()) for name in ("README.md", "docs/vllm.md"))
    pages = "vllm-pages:spectral-quality"
    gains = [
        [than(pages, figure, other) for other in ("vllm", "vllm:fp8")]
        for figure in (OUTPUT, DECODE)
    ]
    if workload == "8k":
        assert (
            "make {} of the tokens/s of vLLM's bf16 cache and {} of its fp8".format(*gains[0])
            in text
        )
        assert "decoding alone {} and {}".format(*gains[1]) in text
    elif workload == "1k":
        assert "256 of 1,024 in and 256 out {} and {}".format(*gains[0]) in text
    else:
        assert "decodes {} and {} as fast".format(*gains[1]) in text
        fit = [found[backend]["stats"]["capacity_sequences"] for backend in (pages, *CACHES)]
        assert "holds {} of them instead of {} and {}".format(*fit) in text
        assert f"decode {gains[1][1]} as fast as fp8 and hold {fit[0] / fit[2]:.2f}x" in page
    if workload != "8k":
        assert f"{found[pages]['stats']['decode_host_ms']:.1f} ms" in page
    commit = stored(f"throughput-8b-vllm-{workload}")["environment"]["commit"]
    assert f"commit {commit}" in page
