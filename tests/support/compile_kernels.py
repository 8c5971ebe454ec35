"""Every kernel that the presets launch, compiled for a GPU that need not be there.

Run outside of the interpreter: `python tests/support compile_kernels [sm_86 ...]
[--case [sm_86=]REGEX ...]`.
Prints a JSON line a kernel and kind of GPU: its name, the case that launched it, bytes of shared
memory, registers of a thread, and bytes that were spilled to the stack.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from spectral_paged.kernels.decode import gpu
from spectral_paged.kernels.decode.shared_pages import SharedPages, seats_per_tile
from spectral_paged.kernels.decode.triton import exact as exact_decode_triton
from spectral_paged.kernels.exact import triton as exact_append_triton
from spectral_paged.kernels.exact.reference import ExactPlaces
from spectral_paged.kernels.launch import configs as launch_configs
from spectral_paged.kernels.rebuild import triton as spectral_rebuild_triton
from spectral_paged.kernels.seal.triton import (
    eigenvectors as eigenvectors_triton,
    seal as seal_triton,
)
from spectral_paged.pages import PRESETS, PageFormat
from support.cards import CARDS, stand_on
from support.kernel_cases import attend, exact_case, seal_zeros
from support.kernel_launches import every_kernel, short_name
from support.page_parts import toy_basis

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which are registers spilled to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (max(map(int, re.findall(rf"{x}:(\d+)", found))) for x in ("REG", "STACK"))
    return registers, stack


def int32_products(ttir):
    """The integer arguments that a kernel multiplies in 32 bits, where a product may overflow."""
    [head] = re.findall(r"tt\.func public .*", ttir)
    names = {name: name for name in re.findall(r"%(\w+): i32", head)}
    found = set()
    for value, source in re.findall(r"%(\w+) = tt\.splat %(\w+) : i32", ttir):
        names[value] = names.get(source, "")
    for pair in re.findall(r"arith\.muli %(\w+), %(\w+) : (?:tensor<[0-9x]+x)?i32", ttir):
        found.update(names.get(value, "") for value in pair)
    return sorted(found - {""})


class Compiled:
    """A stand-in for a kernel that compiles each launch and runs nothing."""

    card = CARDS["sm_90"]
    label = ""
    seen: set[str] = set()

    def __init__(self, kernel, name):
        self.kernel, self.name = kernel, name
        self.source = GluonASTSource if kernel.is_gluon() else ASTSource

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, maxnreg=None, launch_pdl=False, **constants):
        names = self.kernel.arg_names
        assert constants.keys() == set(names[len(args) :]), "as a launch demands"
        signature, aligned, fixed = {}, {}, {}
        for i, name in enumerate(names):
            if i >= len(args):
                signature[name], fixed[(i,)] = "constexpr", constants[name]
            elif isinstance(args[i], torch.Tensor):
                signature[name] = POINTERS[args[i].dtype]
                aligned[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(args[i], float) else "i32"
        key = f"{self.card.kind} {self.kernel.__module__} {signature} {fixed} {num_warps} {maxnreg}"
        if key in self.seen:
            return
        self.seen.add(key)
        source = self.source(self.kernel, signature=signature, constexprs=fixed, attrs=aligned)
        built = triton.compile(
            source,
            target=GPUTarget("cuda", 10 * self.card.capability[0] + self.card.capability[1], 32),
            options={
                "num_warps": num_warps,
                "num_stages": num_stages,
                "maxnreg": maxnreg,
                "launch_pdl": launch_pdl,
            },
        )
        registers, spilled = usage(built.asm["cubin"])
        ttir = built.asm.get("ttir") or built.asm["ttgir"]  # Gluon begins with the second
        found = {
            "card": self.card.kind,
            "kernel": self.name,
            "for": self.label,
            "shared": built.metadata.shared,
            "registers": registers,
            "spilled": spilled,
            "int32_products": int32_products(ttir),
        }
        print(json.dumps(found), flush=True)


def stand_in():
    for module, name in list(every_kernel()):
        setattr(module, name, Compiled(getattr(module, name), short_name(module, name)))


def page_options(format):
    """The arguments that ops over pages of `format` share: layout, rotation, basis."""
    rows = {}
    if format.needs_calibration:
        basis = toy_basis(1, format.num_kv_heads, format.head_dim).bind(format)
        format = basis.format
        rows = {"k_basis": basis.k.rows[0].half(), "v_basis": basis.v.rows[0].half()}
    half = format.head_dim // 2
    return {
        "layout": format.layout,
        "first_position": 64,
        "cos": torch.ones(600, half),
        "sin": torch.zeros(600, half),
        **rows,
    }


def compile_decode(format, group, **scores):
    """Compile the kernels of a decode step over pages, and over pages and exact tokens."""
    plane, table = torch.zeros(format.page_bytes, dtype=torch.uint8), torch.zeros(1, 1).int()
    common, dtype, one = page_options(format), model_dtype(), torch.ones(1).int()
    q = torch.zeros(1, format.num_kv_heads * group, format.head_dim, dtype=dtype)
    gpu.spectral_decode(q, plane, table, one, scale=0.1, **common, **scores)
    if not scores:
        options = common | {"num_kv_heads": format.num_kv_heads, "scale": 0.1, "dtype": dtype}
        config = launch_configs.decode_config(format.layout, q.device)
        config = replace(config, second_stream=False)
        attend(gpu.decode_attention, (q, plane, table, one, table, one), options, config=config)


def compile_sinks(format, group):
    """Compile the kernels that merge parts with sinks, of pages and exact tokens, and of these."""
    plane, table = torch.zeros(format.page_bytes, dtype=torch.uint8), torch.zeros(1, 1).int()
    dtype, one = model_dtype(), torch.ones(1).int()
    q = torch.zeros(1, format.num_kv_heads * group, format.head_dim, dtype=dtype)
    sinks = torch.zeros(format.num_kv_heads * group, dtype=dtype)
    options = page_options(format) | {"num_kv_heads": format.num_kv_heads, "scale": 0.1}
    options |= {"dtype": dtype, "sinks": sinks}
    config = launch_configs.decode_config(format.layout, q.device)
    config = replace(config, second_stream=False)
    for pages in (table, None):
        attend(gpu.decode_attention, (q, plane, table, one, pages, one), options, config=config)


def compile_tiles(format, group):
    """Compile the kernels of tiles of sequences that share a page, and of their merge."""
    plane, table = torch.zeros(format.page_bytes, dtype=torch.uint8), torch.zeros(2, 1).int()
    heads, ones = format.num_kv_heads, torch.ones(2).int()
    shared = SharedPages.of(
        torch.tensor([1, 2]).int(),
        ones,
        table,
        num_kv_heads=heads,
        seats_per_tile=seats_per_tile(group),
    )
    q = torch.zeros(2, heads * group, format.head_dim, dtype=model_dtype())
    options = page_options(format) | {"scale": 0.1, "shared": shared}
    gpu.spectral_decode(q, plane, table, ones, **options)


def compile_rebuild(format):
    plane, units = torch.zeros(format.page_bytes, dtype=torch.uint8), torch.zeros(1).int()
    spectral_rebuild_triton.spectral_rebuild(
        plane, units, dtype=model_dtype(), **page_options(format)
    )


def compile_exact(dim, dtype):
    args, options = exact_case([65], dim=dim, dtype=dtype)
    exact_decode_triton.exact_decode(*args, **options)
    k = torch.zeros(1, 2, dim, dtype=dtype)
    place, plane = torch.zeros(1).int(), torch.zeros(1 << 16, dtype=torch.uint8)
    exact_append_triton.exact_append(k, k, plane, place, place)
    rows = torch.zeros(2, 2, 64, dim, dtype=dtype)
    exact_append_triton.exact_copy(plane, ExactPlaces(*3 * (place,)), rows)


def model_dtype():
    return torch.bfloat16 if Compiled.card.has_bf16 else torch.float16


def preset(name, dim):
    return PageFormat.preset(name, num_kv_heads=1, head_dim=dim)


def cases():
    """What to compile, by name."""
    for name in PRESETS:
        if name == "exact":
            continue
        for dim, groups in ((64, (3,)), (96, (4,)), (128, (4, 7)), (256, (4,))):
            for group in (*groups, 16) if (name, dim) == ("spectral-int8", 128) else groups:
                yield (
                    f"{name}, width {dim}, {group} queries",
                    partial(compile_decode, preset(name, dim), group),
                )
        for dim in (64, 96, 128, 256):
            yield f"rebuilding {name}, width {dim}", partial(compile_rebuild, preset(name, dim))
    for name in ("spectral-quality", "spectral-int8"):
        yield (
            f"{name}, softcap and window",
            partial(
                compile_decode,
                preset(name, 128),
                4,
                softcap=50.0,
                first_visible=torch.zeros(1).int(),
            ),
        )
        for dim, group in ((64, 3), (128, 4)):
            yield (
                f"tiles of {name}, width {dim}, {group} queries",
                partial(compile_tiles, preset(name, dim), group),
            )
        yield f"{name}, sinks", partial(compile_sinks, preset(name, 64), 8)
    for name in ("spectral-quality", "spectral-compact"):
        for dim in (64, 96, 128, 256):
            layout = preset(name, dim).layout
            yield f"sealing {name}, width {dim}", partial(compile_seal, layout)
    for dim in (64, 96, 128, 256):
        yield (
            f"eigenvectors, width {dim}",
            partial(eigenvectors_triton.eigenvectors, torch.eye(dim)[None]),
        )
        for dtype in (model_dtype(), torch.float32):
            yield f"exact, width {dim}, {dtype}", partial(compile_exact, dim, dtype)


def compile_seal(layout):
    seal_zeros(seal_triton.seal, (1, 1, layout.head_dim), 1, layout=layout, dtype=model_dtype())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cards", nargs="*", choices=[*CARDS, []], help="kinds of GPU; all")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="a pattern that the names of cases contain; sm_86=PATTERN is for one kind of GPU",
    )
    options = parser.parse_args()
    wanted = dict.fromkeys(options.cards or CARDS, "")
    for case in options.case:
        kind, _, pattern = case.rpartition("=")
        wanted |= {kind: pattern} if kind else dict.fromkeys(wanted, pattern)
    stand_in()
    for kind, pattern in wanted.items():
        Compiled.card = CARDS[kind]
        stand_on(Compiled.card)
        for label, compile_one in cases():
            if re.search(pattern, label):
                Compiled.label = label
                compile_one()


if __name__ == "__main__":
    main()
