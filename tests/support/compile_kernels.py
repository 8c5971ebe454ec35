"""Every kernel that the presets launch, compiled for a Hopper GPU; no GPU is needed.

Run outside of the interpreter: `python tests/support compile_kernels`. Prints a JSON line a
kernel: its name, the case that launched it, bytes of shared memory, bytes spilled to the stack.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from spectral_paged.kernels.decode import gpu
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
from support.kernel_cases import SealCase, attend, exact_case
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


def spilled(cubin: bytes) -> int:
    """Bytes of stack that the kernel uses, which are registers spilled to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


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
        key = f"{self.kernel.__module__} {signature} {fixed}"
        if key in self.seen:
            return
        self.seen.add(key)
        source = self.source(self.kernel, signature=signature, constexprs=fixed, attrs=aligned)
        built = triton.compile(
            source,
            target=GPUTarget("cuda", 90, 32),
            options={
                "num_warps": num_warps,
                "num_stages": num_stages,
                "maxnreg": maxnreg,
                "launch_pdl": launch_pdl,
            },
        )
        ttir = built.asm.get("ttir") or built.asm["ttgir"]  # Gluon begins with the second
        found = {
            "kernel": self.name,
            "for": self.label,
            "shared": built.metadata.shared,
            "spilled": spilled(built.asm["cubin"]),
            "int32_products": int32_products(ttir),
        }
        print(json.dumps(found), flush=True)


def stand_in():
    for module, name in list(every_kernel()):
        setattr(module, name, Compiled(getattr(module, name), short_name(module, name)))
        if hasattr(module, "dependent_launch"):
            module.dependent_launch = lambda device: {"PDL": True, "launch_pdl": True}


def launch_pages(format, group, **scores):
    """Launch the kernels of decode attention and rebuild over one empty page of `format`."""
    rows = {}
    if format.needs_calibration:
        basis = toy_basis(1, format.num_kv_heads, format.head_dim).bind(format)
        format = basis.format
        rows = {"k_basis": basis.k.rows[0].half(), "v_basis": basis.v.rows[0].half()}
    half = format.head_dim // 2
    plane, table = torch.zeros(format.page_bytes, dtype=torch.uint8), torch.zeros(1, 1).int()
    common = {
        "layout": format.layout,
        "first_position": 64,
        "cos": torch.ones(600, half),
        "sin": torch.zeros(600, half),
        **rows,
    }
    q = torch.zeros(1, format.num_kv_heads * group, format.head_dim, dtype=torch.bfloat16)
    gpu.spectral_decode(
        q, plane, table, torch.ones(1).int(), scale=0.1, explicit=True, **common, **scores
    )
    if format.name == "spectral-quality" and group == 4 and not scores:
        config = launch_configs.decode_config(format.layout, q.device)
        tokens = torch.zeros(1).int()
        args = (q, plane, table, tokens, table, torch.ones(1).int())
        options = common | {"num_kv_heads": format.num_kv_heads, "scale": 0.1, "dtype": q.dtype}
        config = replace(config, second_stream=False)
        attend(gpu.decode_attention, args, options, config=config)
    if group == 4 and format.head_dim == 128:
        spectral_rebuild_triton.spectral_rebuild(plane, table[0], dtype=torch.bfloat16, **common)


def main():
    stand_in()
    launch_configs.gpus_of = lambda device: ("sm_90",)
    cases = [(n, dim, group) for n in PRESETS for dim, group in ((64, 3), (128, 4)) if n != "exact"]
    cases += [("spectral-quality", 128, 7), ("spectral-compact", 128, 7)]
    cases += [("spectral-int8", 128, 8), ("spectral-int8", 128, 16)]
    cases += [("spectral-quality", 256, 4)]  # the portable kernels at their widest
    for name, dim, group in cases:
        Compiled.label = f"{name}, width {dim}, {group} queries"
        launch_pages(PageFormat.preset(name, num_kv_heads=1, head_dim=dim), group)
    for name in ("spectral-quality", "spectral-int8"):
        Compiled.label = f"{name}, softcap and window"
        format = PageFormat.preset(name, num_kv_heads=1, head_dim=128)
        launch_pages(format, 4, softcap=50.0, first_visible=torch.zeros(1).int())
    for name, dim in (("quality-64", 64), ("quality-128", 128), ("wide-256", 256)):
        Compiled.label = f"sealing, width {dim}"
        SealCase(name, heads=1, blocks=1, dtype=torch.bfloat16).seal(seal_triton.seal)
    for dim in (64, 96, 128, 256):
        Compiled.label = f"eigenvectors, width {dim}"
        eigenvectors_triton.eigenvectors(torch.eye(dim)[None])
    for dim, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)):
        Compiled.label = f"exact, width {dim}, {dtype}"
        args, options = exact_case([65], dim=dim, dtype=dtype)
        exact_decode_triton.exact_decode(*args, **options)
    k = torch.zeros(1, 2, 128, dtype=torch.bfloat16)
    place, plane = torch.zeros(1).int(), torch.zeros(1 << 16, dtype=torch.uint8)
    exact_append_triton.exact_append(k, k, plane, place, place)
    rows = torch.zeros(2, 2, 64, 128, dtype=torch.bfloat16)
    exact_append_triton.exact_copy(plane, ExactPlaces(*3 * (place,)), rows)


if __name__ == "__main__":
    main()
