"""Peers of 2025 and 2026 by their published definitions, and the list of all peers of a run.

All have the exact tokens of our formats, 64 landmarks and 64 hot tokens, and code every layer, so
that bytes compare. Their authors keep other windows, and vLLM leaves two layers at each end exact
under TurboQuant. Products with matrices are computed block by block, because libraries choose
products by batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from spectral_paged.benchmarks.quality.methods import (
    FP16_MAX,
    HOT,
    LANDMARKS,
    SCALE_AND_ZERO_BITS,
    Fp8,
    Kivi,
    Method,
    PerToken,
    Rotated,
    Sample,
    check_power_of_two,
    hadamard,
    quantized,
)
from spectral_paged.errors import FormatError
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.kernels.page.layout import BLOCK_TOKENS

LLOYD_ROUNDS = 1000
HALF_BITS = 16
OSCAR_GROUP = 128  # components of a token that share scale and zero
OSCAR_BITS = 2
OSCAR_CLIPS = {"k": 0.96, "v": 0.92}  # the share of a group's magnitudes that its levels span
SAW_BLOCK = 16  # components that a block of the Hadamard matrix mixes
KVTC_MOST_BITS = 8


# ---- arithmetic --------------------------------------------------------------------------


@cache
def lloyd_max(bits: int) -> tuple[Tensor, Tensor, float]:
    """Levels, borders between them and mean square error of the best `2**bits` levels of N(0, 1).

    Max 1960; Lloyd 1982. Both tensors are fp32, ascending.
    """
    # many levels of N(0, 1) lie best as a normal variable of variance 3 does (Panter, Dite 1951)
    shares = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = torch.special.ndtri(shares) * 3**0.5
    far = torch.tensor([40.0], dtype=torch.float64)
    for _ in range(LLOYD_ROUNDS):
        edges = torch.cat((-far, (levels[1:] + levels[:-1]) / 2, far))
        mass = torch.special.ndtr(edges).diff()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / mass
    error = 1 - float((mass * levels.square()).sum())
    return levels.float(), edges[1:-1].float(), error


def nearest(x: Tensor, bits: int) -> Tensor:
    """`x` rounded to the levels of `lloyd_max(bits)`."""
    levels, borders, _ = lloyd_max(bits)
    return levels.to(x.device)[torch.bucketize(x, borders.to(x.device))]


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` `[N, ..., D]` times `matrix` `[..., D, D]`, one of N at a time."""
    return torch.stack([block @ matrix for block in x])


def bit_reversed(size: int) -> Tensor:
    """The places 0 to `size - 1`, a power of two, each with its bits in reverse order."""
    width = size.bit_length() - 1
    return torch.tensor([int(f"{i:0{width}b}"[::-1], 2) if width else 0 for i in range(size)])


def eigenvectors_of(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (columns) of symmetric `moment`, strongest first, fp32."""
    values, vectors = torch.linalg.eigh(moment.double().cpu())
    parts = values.flip(-1).clamp_min(0), vectors.flip(-1)
    return parts[0].float(), parts[1].float()


def fitted(name: str, found: Sequence[Tensor], layer: int) -> Tensor:
    """What `name` learnt for `layer`; raises FormatError if it has seen no text."""
    if layer >= len(found):
        raise FormatError(
            f"{name} has learnt nothing for layer {layer}: call Replay.calibrate with a text other "
            "than the one that is judged"
        )
    return found[layer]


# ---- methods -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TurboQuant:
    """TurboQuant as vLLM has it (`turboquant_4bit_nc`, `turboquant_3bit_nc`), after RoPE.

    K: a unit vector turned by Hadamard's matrix, Lloyd-Max levels of N(0, 1/D), brought to norm 1
    again (`nc`), times the norm in fp16. V: even levels between a token's ends, scale and zero in
    fp16. Zandieh et al., ICLR 2026, without its residual sketch, as there.
    """

    bits: int
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    family: str = "turboquant"

    @property
    def name(self) -> str:
        return f"turboquant{self.bits}"

    def bytes_per_token(self, head_dim: int) -> float:
        check_power_of_two(head_dim)
        codes = math.ceil(head_dim * self.bits / 8)
        return 2 * codes + (HALF_BITS + SCALE_AND_ZERO_BITS) / 8

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys = rotate(k, cos, sin)
        norm = keys.square().sum(dim=-1, keepdim=True).sqrt()
        spread = keys.shape[-1] ** 0.5
        unit = hadamard(keys / norm.clamp_min(1e-8)).view_as(keys)
        code = nearest(unit * spread, self.bits)
        code = code / code.square().sum(dim=-1, keepdim=True).sqrt()
        stored = norm.clamp_max(FP16_MAX).half().float()
        return hadamard(code).view_as(keys) * stored, quantized(v, self.bits)


@dataclass(frozen=True)
class SawInt4:
    """SAW-INT4: INT4 a token and head, of keys turned by a block-diagonal Hadamard matrix.

    Jia et al., arXiv:2604.19157: blocks of 16 components, V as it is, scale and zero a token. The
    authors turn keys after RoPE; with `before_rope` they are turned and stored before it.
    """

    before_rope: bool = False
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    family: str = "rotated"

    @property
    def name(self) -> str:
        return "saw-int4" + ("-pre" if self.before_rope else "")

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * (head_dim * 4 + SCALE_AND_ZERO_BITS) / 8

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys = k if self.before_rope else rotate(k, cos, sin)
        mixed = hadamard(keys.unflatten(-1, (-1, SAW_BLOCK))).view_as(keys)
        blocks = quantized(mixed, 4).unflatten(-1, (-1, SAW_BLOCK))
        keys = hadamard(blocks).view_as(keys)
        return rotate(keys, cos, sin) if self.before_rope else keys, quantized(v, 4)


@dataclass
class Oscar:
    """OSCAR's scheme: INT2 groups of 128 in a basis that queries and scores decide, after RoPE.

    Zhou et al., arXiv:2605.17757, and its code of October 2026. A KV head's K is turned by
    `U H P`: U the eigenvectors of the second moment of its queries, H Hadamard's matrix, P the
    permutation that reverses bits; V alike, by the moment of values, each weighed by what all
    queries score its key. A group's levels span the share of `OSCAR_CLIPS` of its magnitudes.
    """

    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    name: str = "oscar2"
    family: str = "oscar"
    bases: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    def bytes_per_token(self, head_dim: int) -> float:
        check_power_of_two(head_dim)
        groups = head_dim // min(OSCAR_GROUP, head_dim)
        return 2 * (head_dim * OSCAR_BITS + groups * SCALE_AND_ZERO_BITS) / 8

    def calibrate(self, sample: Sample) -> None:
        """Set the bases of every layer and KV head."""
        check_power_of_two(sample.k.shape[-1])
        self.bases = {"k": [], "v": []}
        for k, v, q in zip(sample.k, sample.v, sample.q, strict=True):
            keys = rotate(k, sample.cos, sample.sin)
            queries = q.flatten(1, 2)  # [H, G T, D]
            seen = queries.mT @ queries
            weight = ((keys @ seen) * keys).sum(dim=-1, keepdim=True)
            for side, moment in (("k", seen), ("v", v.mT @ (weight * v))):
                vectors = eigenvectors_of(moment)[1].to(v.device)
                mixed = hadamard(vectors).view_as(vectors)
                self.bases[side].append(mixed[..., bit_reversed(v.shape[-1]).to(v.device)])

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._side("k", layer, rotate(k, cos, sin)), self._side("v", layer, v)

    def _side(self, side: str, layer: int, x: Tensor) -> Tensor:
        basis = fitted(self.name, self.bases.get(side, ()), layer)
        width = min(OSCAR_GROUP, x.shape[-1])
        groups = turned(x, basis).unflatten(-1, (-1, width))
        rank = math.ceil(OSCAR_CLIPS[side] * width)
        reach = groups.abs().kthvalue(rank, dim=-1, keepdim=True).values
        stored = quantized(torch.maximum(-reach, torch.minimum(groups, reach)), OSCAR_BITS)
        return turned(stored.flatten(-2), basis.mT)


@dataclass
class Kvtc:
    """KVTC's transform without its entropy coder: `bits` an element, shared out over components.

    Staniszewski, Łańcucki, arXiv:2511.01815: principal components over all heads, keys before RoPE,
    mean of a calibration text, bits where the expected error falls most. Here a basis spans the
    heads of one layer, not all layers, and a component has Lloyd-Max levels with a deviation a
    block, in fp16.
    """

    bits: int
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    family: str = "kvtc"
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return f"kvtc{self.bits}"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * head_dim * (self.bits + HALF_BITS / BLOCK_TOKENS) / 8

    def calibrate(self, sample: Sample) -> None:
        """Set mean, basis and bits of every layer."""
        self.parts = {"k": [], "v": []}
        for side, layers in (("k", sample.k), ("v", sample.v)):
            for x in layers:
                rows = x.transpose(0, 1).flatten(1)  # [T, H D]
                mean = rows.mean(dim=0)
                rows = rows - mean
                energy, basis = eigenvectors_of(rows.mT @ rows / len(rows))
                given = shared_bits(energy, self.bits * rows.shape[-1])
                self.parts[side].append((mean, basis.to(x.device), given.to(x.device)))

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rotate(self._side("k", layer, k), cos, sin), self._side("v", layer, v)

    def _side(self, side: str, layer: int, x: Tensor) -> Tensor:
        found = self.parts.get(side, ())
        if layer >= len(found):
            fitted(self.name, (), layer)
        mean, basis, given = found[layer]
        rows = turned(x.transpose(1, 2).flatten(2) - mean, basis)  # [N, 512, H D]
        spread = rows.square().mean(dim=1, keepdim=True).sqrt().clamp_max(FP16_MAX)
        spread = spread.half().float()
        rows = rows / torch.where(spread == 0, 1.0, spread)
        stored = torch.zeros_like(rows)
        for bits in range(1, KVTC_MOST_BITS + 1):
            chosen = given == bits
            stored[..., chosen] = nearest(rows[..., chosen], bits)
        rows = turned(stored * spread, basis.mT) + mean
        return rows.unflatten(-1, (x.shape[1], -1)).transpose(1, 2).contiguous()


def shared_bits(energy: Tensor, total: int) -> Tensor:
    """Bits of components of `energy` `[n]` with the least expected error, `total` in all.

    The error of a component falls by less with every bit, so the best `total` steps are taken.
    """
    left = torch.tensor([1.0] + [lloyd_max(b)[2] for b in range(1, KVTC_MOST_BITS + 1)])
    gains = energy.cpu().unsqueeze(-1) * -left.diff()
    taken = torch.zeros(gains.numel(), dtype=torch.int64)
    taken[gains.flatten().sort(descending=True, stable=True).indices[:total]] = 1
    return taken.view_as(gains).sum(dim=-1)


def peer_methods(num_landmark_tokens: int = LANDMARKS) -> list[Method]:
    """Every peer; `fp8-calibrated`, OSCAR and KVTC need `Replay.calibrate` before use."""
    marks = num_landmark_tokens
    return [
        Fp8(num_landmark_tokens=marks),
        Fp8(calibrated=True, num_landmark_tokens=marks),
        *(PerToken(bits, marks) for bits in (8, 4)),
        *(Kivi(bits, marks) for bits in (4, 3, 2)),
        *(Kivi(bits, marks, group=256) for bits in (3, 2)),
        *(Rotated(bits, mean, marks) for mean in (False, True) for bits in (4, 3)),
        *(SawInt4(before, marks) for before in (False, True)),
        *(TurboQuant(bits, marks) for bits in (4, 3)),
        *(Kvtc(bits, marks) for bits in (3, 2)),
        Oscar(marks),
    ]
