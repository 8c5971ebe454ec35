"""Inputs and checks for GPU kernels, the same in Triton's interpreter and on a GPU."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from spectral_paged.conformance.inputs import toy_calibration
from spectral_paged.kernels.decode.batch import Basis, ExactTokens, Pages
from spectral_paged.kernels.decode.reference import decode_attention, exact_decode, spectral_decode
from spectral_paged.kernels.decode.shared_pages import SharedPages, seats_per_tile
from spectral_paged.kernels.exact.reference import ExactPlaces, exact_append, exact_copy
from spectral_paged.kernels.math.rotary import Rotation, stored_keys
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.page.layout import exact_page_bytes
from spectral_paged.kernels.page.view import slot_tokens
from spectral_paged.kernels.rebuild.reference import PagePlaces, spectral_rebuild
from spectral_paged.kernels.seal.triton.seal import WORKSPACE_BYTES
from spectral_paged.pages import PageFormat, decode_pages, encode_pages
from spectral_paged.rope import RotaryTable
from support.page_parts import toy_basis, toy_blocks
from support.paths import DATA

SHARED = {
    "basis": "shared",
    "dim_weighting": "calibrated",
    "rope": "frame",
    "gain": True,
    "outlier_slots": 4,
    "band_rotation": True,
}
MANY_BANDS = {"k_bands": ((16, 8), (16, 4), (16, 3), (16, 2)), "v_bands": ((16, 4), (48, 3))}
# (head width, fields of a format): the shapes of the presets, and every feature beside them
PAGES = {
    "quality-64": (64, {"k_bands": ((32, 4), (32, 2)), "v_bands": ((64, 3),), **SHARED}),
    "quality-128": (128, {"k_bands": ((64, 4), (64, 2)), "v_bands": ((128, 3),), **SHARED}),
    "compact-128": (
        128,
        {"k_bands": ((64, 4), (32, 2)), "v_bands": ((64, 3), (64, 2)), **SHARED},
    ),
    "int8-128": (128, {"k_bands": ((32, 8),), "v_bands": ((64, 8),), "rope": "frame"}),
    "int8-two-bands": (
        128,
        {"k_bands": ((32, 8),), "v_bands": ((64, 4), (64, 2)), "rope": "frame", "gain": True},
    ),
    "int8-post-64": (64, {"k_bands": ((16, 8),), "v_bands": ((32, 8),), "rope": "post"}),
    "many-bands": (64, {**MANY_BANDS, "basis_bits": 4, "gain": True, "rope": "frame"}),
    "four-bits-128": (128, {"k_bands": ((64, 4),), "v_bands": ((64, 4), (64, 2)), **SHARED}),
    "no-mean-no-gain": (
        64,
        {
            "k_bands": ((32, 4),),
            "v_bands": ((64, 2),),
            "basis": "shared",
            "mean": False,
            "rope": "post",
        },
    ),
    "slots-without-gain": (
        64,
        {"k_bands": ((32, 4),), "v_bands": ((32, 3),), "outlier_slots": 3, "rope": "frame"},
    ),
    "uniform-96": (
        96,
        {
            "k_bands": ((48, 4), (16, 3)),
            "v_bands": ((96, 3),),
            "levels": "uniform",
            "rope": "frame",
            "gain": True,
        },
    ),
    "no-slots": (
        64,
        {"k_bands": ((32, 4), (32, 2)), "v_bands": ((64, 3),), **SHARED, "outlier_slots": 0},
    ),
    "wide-256": (256, {"k_bands": ((128, 4),), "v_bands": ((256, 2),), **SHARED}),
}


def page_case(name, *, heads=1, group=3, counts=(0, 3, 1), device="cpu", landmarks=64, scale=0.2):
    """Arguments of `spectral_decode` over pages at scattered units of a poisoned plane.

    Each of `counts` is the number of pages of a sequence; of three, the second is exact (-1).
    """
    dim, fields = PAGES[name]
    format = PageFormat(name, heads, dim, num_landmark_tokens=landmarks, **fields)
    num_pages = sum(counts)
    k, v = toy_blocks(max(num_pages, 1), heads, dim, rank=12)
    k[:, :, 7] *= 5
    k, v = k.to(device), v.to(device)
    given, rows = {}, {}
    if format.needs_calibration:
        basis = toy_basis(2, heads, dim).bind(format, device)
        format, given = basis.format, {"basis": basis, "layers": [1] * len(k)}
        if format.basis == "shared":
            rows = {"k_basis": basis.k.rows[1], "v_basis": basis.v.rows[1]}
    pages = encode_pages(k, v, format, **given)
    size, generator = format.page_bytes, torch.Generator().manual_seed(3)
    places = torch.randperm(num_pages + 3, generator=generator).tolist()
    plane = torch.full(((num_pages + 3) * size,), 255, dtype=torch.uint8, device=device)
    table = torch.full((len(counts), max(*counts, 1) + 1), 10**6, dtype=torch.int32)
    page = 0
    for i, count in enumerate(counts):
        for entry in range(count):
            at = places[page]
            plane[at * size : (at + 1) * size] = pages[page]
            hole = count == 3 and entry == 1
            table[i, entry] = -1 if hole else at * (size // 128)
            page += 1
    rope = RotaryTable.from_theta(10000.0, dim, max_positions=4096, device=device)
    q = torch.randn(len(counts), heads * group, dim, generator=generator).to(device)
    return (q, plane, table.to(device), torch.tensor(counts, device=device)), {
        "layout": format.layout,
        "first_position": landmarks,
        "cos": rope.cos,
        "sin": rope.sin,
        "scale": scale,
        **rows,
    }


def shared_case(name, groups, alone=(), *, heads=1, group=3, device="cpu", **more):
    """`page_case` of sequences that begin alike, in a mixed order, and their `SharedPages`.

    groups: `(pages that all have, (further pages of each))`; alone: pages of sequences without a
    group. A tile takes its members one after the other.
    """
    depths = [depth for depth, _ in groups]
    own = [n for _, further in groups for n in further] + list(alone)
    (_, plane, pages, _), options = page_case(
        name, heads=heads, group=group, counts=(*depths, *own), device=device, **more
    )
    rows, seats, starts, counts, tile = [], [], [], [], 0
    most = seats_per_tile(group)
    for g, (depth, further) in enumerate(groups):
        for i, n in enumerate(further):
            rows.append([*pages[g, :depth].tolist(), *pages[len(depths) + len(rows), :n].tolist()])
            seats.append(1 + (tile + i // most) * most + i % most)
            starts.append(depth)
        tile += -(-len(further) // most)
    for n in alone:
        rows.append(pages[len(depths) + len(rows), :n].tolist())
        seats.append(0)
        starts.append(0)
    counts = [len(row) for row in rows]
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(len(rows), generator=generator)
    table = torch.full((len(rows), max(*counts, 1) + 1), 10**6, dtype=torch.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    q = torch.randn(len(rows), heads * group, PAGES[name][0], generator=generator)
    columns = (torch.tensor(x, dtype=torch.int32)[order].to(device) for x in (seats, starts))
    table, counts = (x[order].to(device) for x in (table, torch.tensor(counts)))
    shared = SharedPages.of(*columns, table, num_kv_heads=heads, seats_per_tile=most)
    return (q.to(device), plane, table, counts), options, shared


def captured_case(name, *, device="cpu"):
    """Arguments of `spectral_decode` over one page of a real model's head with biased keys.

    Its scores reach ten thousand; `tests/data/capture_qwen.py` made the data."""
    data = load_file(DATA / "qwen_biased_head.safetensors")
    q, k, v = (data[n].float() for n in "qkv")
    format = PageFormat(name, 1, 128, **PAGES[name][1])
    rope = RotaryTable.from_theta(1e6, 128, max_positions=1024, device=device)
    k, v = (x[None, None].to(device) for x in (k, v))
    k = stored_keys(k, rope.cos[64:576], rope.sin[64:576], format.rope)
    given, rows = {}, {}
    if format.needs_calibration:
        bound = toy_calibration(format, k, v)
        format, given = bound.format, {"basis": bound, "layers": [0]}
        rows = {"k_basis": bound.k.rows[0], "v_basis": bound.v.rows[0]}
    plane = encode_pages(k, v, format, **given).flatten()
    table = torch.zeros(len(q), 1, dtype=torch.int32, device=device)
    counts = torch.ones(len(q), dtype=torch.int32, device=device)
    return (q.to(device), plane, table, counts), {
        "layout": format.layout,
        "first_position": 64,
        "cos": rope.cos,
        "sin": rope.sin,
        "scale": 128**-0.5,
        **rows,
    }


def page_error(op, args, options, *, scores=None, **more):
    """Largest relative error of out and lse against the twin; empty sequences must be exact.

    `scores` (softcap, first_visible) goes to both, `more` only to `op`."""
    scores = scores or {}
    want = spectral_decode(*args, **options, **scores)
    got = op(*args, **options, **scores, **more)
    empty = torch.isneginf(want[1]).all(dim=1)
    assert not got[0][empty].any() and bool(torch.isneginf(got[1][empty]).all())
    full = ~empty
    return max(
        float((x[full] - y[full]).norm() / y[full].norm().clamp_min(1e-9))
        for x, y in zip(got, want)
    )


def rebuild_error(op, args, options):
    """Largest relative error of rebuilt K and V of the second sequence, against the twin."""
    plane, table, counts = args[1], args[2], args[3]
    common = {name: value for name, value in options.items() if name != "scale"}
    entries = table[1, : int(counts[1])]
    want = spectral_rebuild(plane, entries, dtype=torch.float32, **common)
    got = op(plane, entries, dtype=torch.float32, **common)
    assert [x.shape for x in got] == [x.shape for x in want]
    return max(float((x - y).norm() / y.norm()) for x, y in zip(got, want))


def copy_both(op, *, device="cpu", dtype=torch.float32, dim=24):
    """Rows after the twin's copy of exact pages and after `op`'s, from any pages to any rows."""
    heads, pages = 3, 7
    size = exact_page_bytes(heads, dim, dtype.itemsize)
    size = -(-size // 128) * 128
    plane = torch.randn(pages * size // dtype.itemsize).to(dtype).view(torch.uint8).to(device)
    units, rows, counts = [5, 0, 3, 6], [0, 70, 64, 200], [64, 1, 6, 63]
    columns = (torch.tensor(x, dtype=torch.int32, device=device) for x in (units, rows, counts))
    units, rows, counts = columns
    places = ExactPlaces(units * (size // 128), rows, counts)
    found = []
    for copy in (exact_copy, op):
        out = torch.full((2, heads, 264, dim), 9.0, dtype=dtype, device=device)
        copy(plane, places, out)
        found.append(out)
    return found


def placed_pages(op, args, options, **changes):
    """K and V of the pages of two sequences by one call, and by a call for each sequence.

    Rows around them keep what they have. Both are of `op`, and blocks that are exact are left out.
    """
    plane, table, counts = args[1], args[2], args[3]
    common = {name: value for name, value in options.items() if name != "scale"} | changes
    heads, dim = common["layout"].num_kv_heads, common["layout"].head_dim
    out = torch.full((2, heads, 4096, dim), 9.0, dtype=common["dtype"], device=plane.device)
    want = out.clone()
    at, parts = 7, []
    for i in range(2):
        entries = table[i, : int(counts[i])].clone()
        entries[1:2] = -1
        blocks = (entries >= 0).nonzero().squeeze(-1)
        k, v = op(plane, entries, **common)
        want[:, :, at : at + k.shape[1]] = torch.stack((k, v))
        rows = at + 512 * torch.arange(len(blocks), device=plane.device)
        parts.append((entries[blocks], blocks.int(), rows.int()))
        at += k.shape[1] + 5
    units, *places = map(torch.cat, zip(*parts))
    op(plane, units, places=PagePlaces(*places), out=(out[0], out[1]), **common)
    return out, want


def append_both(op, *, device="cpu", dtype=torch.float32):
    """Planes after the twin's append and after `op`'s: 70 tokens, K and V in one wide tensor."""
    heads, dim, pages = 3, 24, 4
    wide = torch.randn(70, 2 * heads * dim, device=device).to(dtype)
    k, v = (x.unflatten(1, (heads, dim)) for x in wide.chunk(2, dim=1))
    size = exact_page_bytes(heads, dim, dtype.itemsize)
    order = torch.tensor([2, 0, 3, 1], device=device, dtype=torch.int32) * (size // 128)
    place = torch.arange(30, 100, device=device)
    planes = []
    for append in (exact_append, op):
        plane = torch.full((pages * size,), 255, dtype=torch.uint8, device=device)
        append(k, v, plane, order[place // 64], place % 64)
        planes.append(plane)
    return planes


def exact_case(counts, *, heads=2, group=3, dim=64, dtype=torch.float32, device="cpu"):
    """Arguments of `exact_decode` over scattered pages of a plane that is NaN elsewhere."""
    generator = torch.Generator().manual_seed(1)
    size = exact_page_bytes(heads, dim, dtype.itemsize)
    pages = [-(-count // 64) for count in counts]
    order = torch.randperm(sum(pages) + 3, generator=generator) * (size // 128)
    plane = torch.full(((sum(pages) + 3) * size,), 0xFF, dtype=torch.uint8)
    table = torch.full((len(counts), max(pages) + 1), 10**6, dtype=torch.int32)
    at = 0
    for i, (count, num) in enumerate(zip(counts, pages)):
        k, v = (torch.randn(2, count, heads, dim, generator=generator) * 2).to(dtype)
        table[i, :num] = order[at : at + num]
        at += num
        place = torch.arange(count)
        exact_append(k, v, plane, table[i][place // 64], place % 64)
    q = torch.randn(len(counts), heads * group, dim, generator=generator)
    args = (q.to(device), plane.to(device), table.to(device), torch.tensor(counts, device=device))
    return args, {"num_kv_heads": heads, "scale": dim**-0.5, "dtype": dtype}


def exact_error(op, args, options):
    """Largest absolute error of out and lse; sequences without tokens must be exact."""
    want, got = exact_decode(*args, **options), op(*args, **options)
    empty = torch.isneginf(want[1]).all(dim=1)
    assert not got[0][empty].any() and bool(torch.isneginf(got[1][empty]).all())
    return max(float((x[~empty] - y[~empty]).abs().max()) for x, y in zip(got, want))


def attend_case(name, counts, tokens, *, group=3, heads=2, dtype=torch.float32, device="cpu"):
    """Arguments of `decode_attention` over exact tokens and pages of one poisoned plane."""
    dim = PAGES[name][0]
    (q, pages, table, counts), options = page_case(
        name, heads=heads, group=group, counts=counts, device=device
    )
    (_, exact, exact_table, tokens), _ = exact_case(
        tokens, heads=heads, group=group, dim=dim, dtype=dtype, device=device
    )
    plane = torch.cat((pages, exact))
    args = (q, plane, exact_table + len(pages) // 128, tokens, table, counts)
    return args, options | {"num_kv_heads": heads, "dtype": dtype}


def attend(op, args, options, *, config=None):
    """The output of `op`, a `decode_attention`, for the arguments of `attend_case`.

    `options` may add a window, a soft cap and sinks."""
    q, plane, exact_table, tokens, table, counts = args
    o = dict.fromkeys(("softcap", "first_exact", "first_visible", "sinks", "shared")) | options
    exact = ExactTokens(exact_table, tokens, o["num_kv_heads"], o["dtype"], o["first_exact"])
    pages = None
    if table is not None:
        rotation = Rotation(o["cos"], o["sin"], o["first_position"])
        pages = Pages(
            table,
            counts,
            o["layout"],
            rotation,
            o["first_visible"],
            config=config,
            shared=o["shared"],
        )
    basis = Basis(o.get("k_basis"), o.get("v_basis"))
    sinks = o["sinks"]
    scores = Scores(o["scale"], o["softcap"], sinks is not None)
    return op(q, plane, exact, pages, scores, basis, sinks)


MILD = {"scale": 0.01}  # scores of `attend_case` of a few units, whose log-sum-exp is about 6


def some_sinks(num_heads, dtype=torch.float32, device="cpu"):
    """A sink that takes nothing, one that takes all, and others between, over and over; those
    between count where scores are of the size that `MILD` makes them."""
    values = torch.tensor([-1e4, 4.0, 200.0, 6.0, 9.0], dtype=dtype, device=device)
    return values.repeat(num_heads)[:num_heads].contiguous()


def attend_error(op, args, options):
    """Largest relative error against the twin; sequences without tokens must be exact."""
    want, got = (attend(f, args, options) for f in (decode_attention, op))
    assert got.dtype == want.dtype == args[0].dtype
    empty = (args[3] == 0) & (args[5] == 0)
    assert not got[empty].any()
    return float((got.float() - want.float()).norm() / want.float().norm())


# ---- sealing -----------------------------------------------------------------------------

# (layers, KV heads, head width) of Qwen2.5-0.5B, Qwen2.5-7B, Qwen3-8B and Llama-3.1-8B
SEAL_SHAPES = ((24, 2, 64), (28, 4, 128), (36, 8, 128), (32, 8, 128))
SEALED = ("quality-64", "quality-128", "compact-128", "four-bits-128", "wide-256")


def blocks_at_once(shape):
    """The number of blocks that a launch of a seal takes; `shape` is (layers, KV heads, width)."""
    layers, heads, dim = shape
    return WORKSPACE_BYTES // (layers * heads * 2 * dim * 2 * 512)


def seal_zeros(
    op, shape, blocks, *, device="cpu", layout=None, dtype=torch.bfloat16, compile_only=False
):
    """Seal `blocks` blocks of zeros into one page; `shape` is (layers, KV heads, head width)."""
    layers, heads, dim = shape
    if layout is None:
        fields = PAGES["quality-64" if dim == 64 else "quality-128"][1]
        layout = PageFormat("zeros", heads, dim, **fields).layout
    page = 8 * exact_page_bytes(heads, dim, 2)
    planes = torch.zeros(layers, page + layout.page_bytes, dtype=torch.uint8, device=device)
    ints = {"dtype": torch.int32, "device": device}
    projections = [
        torch.zeros(layers, heads, dim, side.rank, device=device) for side in (layout.k, layout.v)
    ]
    table = torch.zeros(600, dim // 2, device=device)
    return op(
        planes,
        (torch.arange(8, **ints) * (page // 8 // 128)).repeat(blocks, 1),
        torch.full((blocks,), page // 128, **ints),
        torch.zeros(blocks, **ints),
        layout=layout,
        dtype=dtype,
        cos=table + 1,
        sin=table,
        k_projection=projections[0],
        v_projection=projections[1],
        compile_only=compile_only,
    )


class SealCase:
    """Blocks of `layers` layers in scattered exact pages of one arena, sealed and compared."""

    def __init__(
        self,
        name,
        *,
        layers=2,
        heads=2,
        blocks=2,
        device="cpu",
        dtype=torch.float32,
        change=None,
    ):
        dim, fields = PAGES[name]
        format = PageFormat(name, heads, dim, **fields)
        self.layers, self.blocks = range(layers), blocks
        self.basis = toy_basis(layers, heads, dim).bind(format, device)
        self.format = format = self.basis.format
        self.k, self.v = (
            x.to(dtype).unflatten(0, (blocks, layers))
            for x in toy_blocks(layers * blocks, heads, dim, rank=20)
        )
        self.k[..., 7, :] *= 5
        if change is not None:
            change(self.k, self.v)
        size = exact_page_bytes(heads, dim, dtype.itemsize)
        order = torch.randperm(8 * blocks + 2, generator=torch.Generator().manual_seed(5))
        exact = (order[: 8 * blocks] * (size // 128)).int().view(blocks, 8)
        start = len(order) * size
        pages = (start + torch.arange(blocks).flip(0) * format.page_bytes) // 128
        self.first = 64 + 512 * torch.arange(blocks)
        arena = torch.full((layers, start + blocks * format.page_bytes), 255, dtype=torch.uint8)
        place = torch.arange(512)
        for b in range(blocks):
            for layer in self.layers:
                k, v = (x[b, layer].transpose(0, 1).contiguous() for x in (self.k, self.v))
                exact_append(k, v, arena[layer], exact[b][place // 64], place % 64)
        self.arena, self.k, self.v = arena.to(device), self.k.to(device), self.v.to(device)
        self.exact, self.pages = exact.to(device), pages.int().to(device)
        self.rope = RotaryTable.from_theta(10000.0, dim, max_positions=4096, device=device)
        self.options = {
            "layout": format.layout,
            "dtype": dtype,
            "cos": self.rope.cos,
            "sin": self.rope.sin,
            **self.basis.projections(self.layers),
        }

    def seal(self, op, blocks=slice(None)):
        """Seal blocks into the arena's pages with `op`; returns its counts of NaN and Inf."""
        first = self.first.int().to(self.arena.device)[blocks]
        return op(self.arena, self.exact[blocks], self.pages[blocks], first, **self.options)

    def page(self, block):
        """The bytes of a block's sealed pages, uint8 `[layers, page_bytes]`."""
        start = int(self.pages[block]) * 128
        return self.arena[:, start : start + self.format.page_bytes].contiguous()

    def errors(self, block, tokens=slice(None)):
        """Relative errors of K and V over `tokens`: (sealed page, page of the torch encoder)."""
        span = slice(int(self.first[block]), int(self.first[block]) + 512)
        cos, sin = self.rope.cos[span], self.rope.sin[span]
        k = stored_keys(self.k[block], cos, sin, self.format.rope)
        given = (k, self.v[block].float())
        rows = {"basis": self.basis, "layers": [*self.layers]}
        twin = encode_pages(*given, self.format, **rows)
        return [
            [
                float((x - y)[..., tokens, :].norm() / y[..., tokens, :].norm())
                for x, y in zip(decode_pages(pages, self.format, **rows), given)
            ]
            for pages in (self.page(block), twin)
        ]

    def outliers(self, block):
        return slot_tokens(self.page(block), self.format.layout)
