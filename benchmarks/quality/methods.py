"""Methods to store a sealed block of 512 tokens: their interface, and the older peers.

`peers.py` has those of 2025 and 2026, and the list of all.

A method gets keys before RoPE and returns the K and V that attention would read: keys after RoPE,
values as stored. The arithmetic is fp32 and elementwise (or a sum in a fixed order) over a block,
so a single block and a block in a batch are the same to the bit on every device. Byte counts are
those of a packed cache: codes, scales, zeros and means, nothing rounded away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from spectral_paged.errors import FormatError
from spectral_paged.kernels.math.rotary import rotate
from spectral_paged.kernels.page.layout import BLOCK_TOKENS

LANDMARKS = 64
HOT = 64
NUM_QUERIES = 64  # a block's last queries, whose attention may weigh its tokens
FP8_MAX = 448.0  # largest finite float8_e4m3fn
FP16_MAX = 65504.0
SCALE_AND_ZERO_BITS = 32  # two fp16 values a group
KIVI_GROUP = 32


class Method(Protocol):
    """A way to store sealed blocks, as the replay calls it.

    Attributes:
        name: label in reports, unique.
        family: `spectral | fp8 | int | kivi | rotated | turboquant | oscar | kvtc | exact`.
        num_landmark_tokens: first tokens of a sequence that stay exact.
        hot_tokens: newest tokens that stay exact.
    """

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def num_landmark_tokens(self) -> int: ...
    @property
    def hot_tokens(self) -> int: ...

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of K and V of one KV head and one sealed token, overhead counted."""
        ...

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as attention reads them from stored blocks; blocks are independent.

        Args:
            k, v: fp32 `[N, H, 512, D]`, keys before RoPE.
            cos, sin: fp32 `[N, 1, 512, rotary_dim / 2]` of the blocks' positions.

        Returns:
            fp32 keys after RoPE and values, `[N, H, 512, D]`.
        """
        ...


@runtime_checkable
class ManyLayers(Protocol):
    """A method that takes blocks of many layers in one call, to keep a GPU busy."""

    def rebuild_layers(
        self, layers: Sequence[int], k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same as `Method.rebuild`; `layers` are those of the N blocks."""
        ...


@runtime_checkable
class WantsQueries(Protocol):
    """A method that weighs a block by its own last queries."""

    @property
    def num_queries(self) -> int: ...

    def rebuild_with(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same as `Method.rebuild`, with `queries` `[N, H, G, num_queries, D]` after RoPE."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """Keys, values and queries of a text that is never judged, fp32.

    `k` (before RoPE) and `v` `[layers, H, tokens, D]`, `q` (after RoPE) `[layers, H, G, tokens,
    D]`, `cos` and `sin` `[tokens, rotary_dim / 2]`.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    cos: Tensor
    sin: Tensor


@runtime_checkable
class Calibrated(Protocol):
    """A method that needs keys, values and queries of another text once, before it is used."""

    def calibrate(self, sample: Sample) -> None:
        """Learn from the sample."""
        ...


# ---- arithmetic --------------------------------------------------------------------------


def quantized(x: Tensor, bits: int) -> Tensor:
    """`x` `[..., group]` rounded to `2**bits` even levels between the group's ends.

    Scale and zero (the minimum) are fp16, as KIVI and QuaRot store them. Codes are computed with
    the rounded scale and zero, so the rounding to fp16 costs at most a clamp.
    """
    top = (1 << bits) - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    zero = low.clamp(-FP16_MAX, FP16_MAX).half().float()
    scale = ((high - low) / top).clamp_max(FP16_MAX).half().float()
    codes = ((x - zero) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, top)
    return codes.mul_(scale).add_(zero)


def rounded_fp8(x: Tensor, scale: float) -> Tensor:
    """`x` in e4m3 units of `scale`, saturating at 448 units."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension; it is its own inverse.

    It takes butterflies rather than a product with the matrix, because libraries choose products by
    batch size, and a block must not depend on the others of its batch.

    Raises:
        FormatError: the width is no power of two.
    """
    dim = x.shape[-1]
    check_power_of_two(dim)
    x = x.reshape(-1, dim)
    half = 1
    while half < dim:
        pairs = x.view(-1, dim // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((a + b, a - b), dim=2)
        half *= 2
    return x.reshape(-1, dim).mul_(dim**-0.5)


def check_power_of_two(head_dim: int) -> None:
    """Raise FormatError for a width without a Walsh-Hadamard transform."""
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise FormatError(
            f"head_dim is {head_dim}; the Hadamard rotation needs a power of two: leave the "
            "'rotated' methods out for this model"
        )


def block_mean(x: Tensor) -> Tensor:
    """Mean over the tokens of `x` `[N, H, 512, D]`, rounded to fp16: `[N, H, 1, D]`.

    Halves are added to halves, which is the same order of sums at any batch size.
    """
    count = x.shape[-2]
    total = x
    while (rows := total.shape[-2]) > 1:
        total = total[..., : rows // 2, :] + total[..., rows // 2 :, :]
    return (total / count).clamp(-FP16_MAX, FP16_MAX).half().float()


# ---- methods -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """The method that leaves blocks as they are, at 2 bytes an element."""

    name: str = "exact"
    family: str = "exact"
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT

    def bytes_per_token(self, head_dim: int) -> float:
        return 4.0 * head_dim

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return rotate(k, cos, sin), v


@dataclass
class Fp8:
    """e4m3, post-RoPE, one scale a layer and side: 1 ("unit"), or calibrated as vLLM's k_scale.

    A calibrated scale is the largest value of another text over 448; larger values saturate. Scales
    are per layer, so they cost no bytes a token.
    """

    calibrated: bool = False
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    family: str = "fp8"
    scales: list[tuple[float, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "fp8-calibrated" if self.calibrated else "fp8-unit"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2.0 * head_dim

    def calibrate(self, sample: Sample) -> None:
        """Set scales from keys after RoPE and values, unless unit."""
        if self.calibrated:
            keys = rotate(sample.k, sample.cos, sample.sin)
            peaks = [x.abs().amax(dim=(1, 2, 3)).clamp_min(1e-12) for x in (keys, sample.v)]
            k_peaks, v_peaks = ((p / FP8_MAX).tolist() for p in peaks)
            self.scales = list(zip(k_peaks, v_peaks, strict=True))

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.calibrated and layer >= len(self.scales):
            raise FormatError(
                f"{self.name} has no scale for layer {layer}: call Replay.calibrate with a text "
                "other than the one that is judged"
            )
        k_scale, v_scale = self.scales[layer] if self.calibrated else (1.0, 1.0)
        return rounded_fp8(rotate(k, cos, sin), k_scale), rounded_fp8(v, v_scale)


@dataclass(frozen=True)
class PerToken:
    """Integers with fp16 scale and zero per token and head, post-RoPE, K and V alike."""

    bits: int
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    family: str = "int"

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def bytes_per_token(self, head_dim: int) -> float:
        return 2 * (head_dim * self.bits + SCALE_AND_ZERO_BITS) / 8

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return quantized(rotate(k, cos, sin), self.bits), quantized(v, self.bits)


@dataclass(frozen=True)
class Kivi:
    """K per channel over 32 tokens, V per token over 32 channels, post-RoPE (Liu et al. 2024).

    bits + 32/32 bits an element at D >= 32: 3 bits cost 4 (4.0x), 2 bits 3 (5.3x). A narrower
    head has one group of its own width. With another `group` bytes come near those of our formats.
    """

    bits: int
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    family: str = "kivi"
    group: int = KIVI_GROUP

    @property
    def name(self) -> str:
        return f"kivi{self.bits}" + (f"-g{self.group}" if self.group != KIVI_GROUP else "")

    def bytes_per_token(self, head_dim: int) -> float:
        k_bits = self.bits + SCALE_AND_ZERO_BITS / self.group
        v_bits = self.bits + SCALE_AND_ZERO_BITS / self._v_group(head_dim)
        return head_dim * (k_bits + v_bits) / 8

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        columns = rotate(k, cos, sin).transpose(-1, -2).unflatten(-1, (-1, self.group))
        groups = v.unflatten(-1, (-1, self._v_group(v.shape[-1])))
        new_k = quantized(columns.contiguous(), self.bits).flatten(-2).transpose(-1, -2)
        return new_k, quantized(groups, self.bits).flatten(-2)

    def _v_group(self, head_dim: int) -> int:
        group = min(self.group, head_dim)
        if head_dim % group:
            raise FormatError(f"head_dim is {head_dim}; {self.name} groups {self.group} channels")
        return group


@dataclass(frozen=True)
class Rotated:
    """Per-token integers of Hadamard-rotated heads (QuaRot, Ashkboos et al. 2024).

    `mean`: keys are taken before RoPE, and the block's mean of K and of V is removed first and
    kept in fp16. Without it keys are taken after RoPE, as QuaRot does.
    """

    bits: int
    mean: bool = False
    num_landmark_tokens: int = LANDMARKS
    hot_tokens: int = HOT
    family: str = "rotated"

    @property
    def name(self) -> str:
        return f"rotated-int{self.bits}" + ("-pre-mean" if self.mean else "")

    def bytes_per_token(self, head_dim: int) -> float:
        check_power_of_two(head_dim)
        mean_bits = 16 * head_dim / BLOCK_TOKENS if self.mean else 0.0
        return 2 * (head_dim * self.bits + SCALE_AND_ZERO_BITS + mean_bits) / 8

    def rebuild(
        self, layer: int, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.mean:
            return rotate(self._side(k), cos, sin), self._side(v)
        return self._side(rotate(k, cos, sin)), self._side(v)

    def _side(self, x: Tensor) -> Tensor:
        if not self.mean:
            return hadamard(quantized(hadamard(x), self.bits)).view_as(x)
        mean = block_mean(x)
        return hadamard(quantized(hadamard(x - mean), self.bits)).view_as(x) + mean
