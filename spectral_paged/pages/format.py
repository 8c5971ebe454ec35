"""The page format is every choice that fixes a page's bytes and their meaning.

One page holds one sealed block (512 tokens) of one layer, all KV heads, K and V. `sections.py`
draws its bytes. A page contains no position: keys are stored before RoPE (`rope="pre"`), relative
to their frame (`rope="frame"`) or after RoPE (`rope="post"`), so the same block gives the same
bytes wherever the page lies in memory.

A token's K or V is read as

```
X[t] ~= mean + gain[t] * sum_i scale[i] * level(C[t, i]) * B[i]
```

with integer levels of 8, 4, 3 or 2 bits in bands of components, strongest first, and a basis B that
lies in the page or is shared by all pages of a layer and KV head.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from spectral_paged.errors import FormatError, shown
from spectral_paged.kernels.page.layout import (
    BLOCK_TOKENS,
    EXACT_PAGE_TOKENS,
    PageLayout,
    exact_page_bytes,
)
from spectral_paged.pages.sections import Bands, page_layout

BITS = (8, 4, 3, 2)
MAX_SLOTS = 64
CHOICES = {
    "basis": ("page", "shared"),
    "rope": ("pre", "frame", "post"),
    "levels": ("gaussian", "uniform"),
    "decomposition": ("gram", "randomized"),
    "dim_weighting": ("none", "diagonal", "calibrated"),
    "basis_bits": (8, 4),
}


@dataclass(frozen=True)
class PageFormat:
    """Everything that fixes a page's bytes and meaning; equal formats share pages.

    Args:
        name: a label for reports that is not part of the fingerprint.
        num_kv_heads, head_dim: geometry of the model's K and V.
        k_bands, v_bands: `((count, bits), ...)` in component order, counts multiples of 16, bits 8,
            4, 3 or 2; empty for the `exact` format, which never seals.
        basis: `page`: every page stores its own; `shared`: one a layer and KV head, from a
            calibration (`basis_id` names it once the format is bound to it).
        basis_bits: 8, or 4 to store the page's basis rows of bands of 4 bits and less in INT4.
        rope: keys stored before rotation (`pre`), after it (`post`), or turned relative to the
            middle of their frame of 128 tokens (`frame`), which keeps most of what makes keys
            compressible before rotation and lets a kernel turn the query instead of the keys.
        mean: subtract the page mean of K and of V before the decomposition and store it in fp16.
        gain: store an 8-bit logarithmic gain per token, head and side.
        scale_tokens: tokens that share one scale a component: 512, 256, 128 or 64.
        levels: reconstruction levels of bands below 8 bits: `gaussian` (Lloyd-Max, with
            least-squares scales) or `uniform` (evenly spaced up to the largest value).
        band_rotation: rotate each band below 8 bits by a Hadamard matrix (a cosine transform where
            the count is no power of two), so that its components share energy and tails.
        outlier_slots: outlier tokens a head and page, whose K and V are kept in fp16 beside the
            codes; a gain of code 0 marks them for kernels.
        num_landmark_tokens: first tokens of a sequence, which are never sealed; multiple of 64.
        hot_tokens: newest tokens of a sequence, which are not sealed yet; multiple of 64.
        prefill_segment: prompt tokens whose queries see each other exactly; multiple of 512. 0
            means the tokens of one step, however many, for callers that cannot cut their steps;
            the steps of a prompt then decide what its queries see.
        decomposition: method for a page's own basis: `gram` (eigenvectors of the D x D Gram
            matrix) or `randomized` (Halko, Martinsson, Tropp 2011: Gaussian sketch with power
            iterations).
        dim_weighting: `calibrated` weighs K by the second moment of the queries and V by the output
            projection before the decomposition, as the calibration saw them; `diagonal` uses the
            energy of each dimension only.

    Raises:
        FormatError: a value breaks the kernel contract; the message names it and the limit.
    """

    name: str
    num_kv_heads: int
    head_dim: int
    k_bands: Bands = ()
    v_bands: Bands = ()
    basis: Literal["page", "shared"] = "page"
    basis_bits: Literal[8, 4] = 8
    basis_id: str = ""
    rope: Literal["pre", "frame", "post"] = "pre"
    mean: bool = True
    gain: bool = False
    scale_tokens: int = BLOCK_TOKENS
    levels: Literal["gaussian", "uniform"] = "gaussian"
    band_rotation: bool = False
    outlier_slots: int = 0
    num_landmark_tokens: int = 64
    hot_tokens: int = 64
    prefill_segment: int = 2048
    decomposition: Literal["gram", "randomized"] = "gram"
    dim_weighting: Literal["none", "diagonal", "calibrated"] = "none"

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1:
            raise FormatError(f"num_kv_heads is {self.num_kv_heads}; it must be at least 1")
        if self.head_dim < 16 or self.head_dim % 16 or self.head_dim > 256:
            raise FormatError(
                f"head_dim is {self.head_dim}; pages need a multiple of 16 between 16 and 256"
            )
        for side, bands in (("k_bands", self.k_bands), ("v_bands", self.v_bands)):
            self._check_bands(side, bands)
        if bool(self.k_bands) != bool(self.v_bands):
            raise FormatError("k_bands and v_bands must both be empty (exact) or both be given")
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                given = shown(getattr(self, field))
                raise FormatError(f"{field} is {given}; use {' or '.join(map(repr, allowed))}")
        if self.scale_tokens not in (64, 128, 256, BLOCK_TOKENS):
            raise FormatError(f"scale_tokens is {self.scale_tokens}; use 64, 128, 256 or 512")
        if not 0 <= self.outlier_slots <= MAX_SLOTS:
            raise FormatError(
                f"outlier_slots is {self.outlier_slots}; a page takes 0 to {MAX_SLOTS}"
            )
        if self.basis_id and not self.needs_calibration:
            raise FormatError("basis_id names a calibration, but this format uses none")
        for field, value, step, low in (
            ("num_landmark_tokens", self.num_landmark_tokens, EXACT_PAGE_TOKENS, 0),
            ("hot_tokens", self.hot_tokens, EXACT_PAGE_TOKENS, 0),
            ("prefill_segment", self.prefill_segment or BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_TOKENS),
        ):
            if value < low or value % step:
                raise FormatError(
                    f"{field} is {value}; it must be a multiple of {step}, at least {low}: "
                    f"use {max(low, -(-max(value, 0) // step) * step)}"
                )

    def _check_bands(self, side: str, bands: Bands) -> None:
        for count, bits in bands:
            if count < 16 or count % 16:
                raise FormatError(
                    f"{side} has a band of {count} components; counts are multiples of 16"
                )
            if bits not in BITS:
                raise FormatError(f"{side} has a {bits}-bit band; bands have 8, 4, 3 or 2 bits")
        rank = sum(count for count, _ in bands)
        if rank > self.head_dim:
            raise FormatError(
                f"{side} has rank {rank} but head_dim is {self.head_dim}: "
                f"a head has no more than {self.head_dim} components, lower the rank"
            )

    # ---- meaning -------------------------------------------------------------------------

    @property
    def seals(self) -> bool:
        """True if blocks become pages; False for `exact`."""
        return bool(self.k_bands)

    @property
    def k_rank(self) -> int:
        return sum(count for count, _ in self.k_bands)

    @property
    def v_rank(self) -> int:
        return sum(count for count, _ in self.v_bands)

    @property
    def needs_calibration(self) -> bool:
        """True if pages are read or written with the basis or weights of a calibration."""
        return self.seals and (self.basis == "shared" or self.dim_weighting != "none")

    @cached_property
    def fingerprint(self) -> str:
        """The format's digest: 16 hex digits over every field but the name.

        Every prefix hash contains it.
        """
        # a former field, kept so that stored results and prefixes keep their digests
        fields = asdict(self) | {"token_weighting": "none"}
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    # ---- bytes ---------------------------------------------------------------------------

    @cached_property
    def layout(self) -> PageLayout:
        """The byte offsets of a page; raises FormatError for `exact`, which has no pages."""
        if not self.seals:
            raise FormatError("the exact format has no pages, so it has no page layout")
        return page_layout(
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            k_bands=self.k_bands,
            v_bands=self.v_bands,
            page_basis=self.basis == "page",
            low_basis_bits=self.basis_bits,
            mean=self.mean,
            gain=self.gain,
            scale_groups=BLOCK_TOKENS // self.scale_tokens,
            num_slots=self.outlier_slots,
            rope=self.rope,
            levels=self.levels,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, padding counted; 0 for `exact`."""
        return self.layout.page_bytes if self.seals else 0

    def exact_page_bytes(self, itemsize: int) -> int:
        """Bytes of one exact page (64 tokens, one layer) with `itemsize`-byte elements."""
        return exact_page_bytes(self.num_kv_heads, self.head_dim, itemsize)

    @property
    def page_ratio(self) -> float:
        """Bytes of 512 tokens at 2 bytes an element over `page_bytes`; 1.0 for `exact`."""
        if not self.seals:
            return 1.0
        return self.exact_page_bytes(2) * (BLOCK_TOKENS // EXACT_PAGE_TOKENS) / self.page_bytes

    # ---- variants ------------------------------------------------------------------------

    @classmethod
    def preset(
        cls, name: str, *, num_kv_heads: int, head_dim: int, prefill_segment: int = 2048
    ) -> PageFormat:
        """The preset `name` for a model's geometry; see `spectral_paged.pages.presets`.

        Raises:
            FormatError: unknown preset, or a head width it has no bands for.
        """
        from spectral_paged.pages.presets import preset_fields

        fields = preset_fields(name, head_dim)
        return cls(
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            prefill_segment=prefill_segment,
            **fields,
        )
