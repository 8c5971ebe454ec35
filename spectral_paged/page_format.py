"""The page format: every choice that fixes a page's bytes and what they mean.

One page holds one sealed block (512 tokens) of one layer, all KV heads, K and V:

```
page            | head 0        | head 1        | ...          page_bytes, multiple of 128
head record     | K coeff | K basis | K scale | K mean | V coeff | V basis | V scale | V mean |pad
                  512 x rK   rK x D    rK x 4    D x 2   512 x rV   rV x D    rV x 4    D x 2
                  uint8      uint8     fp32      fp16
```

Coefficients and basis are INT8 stored with an offset of 128 (a byte permute then makes exact fp16
integers). One fp32 scale per component folds the coefficient scale and the basis row scale:
`X[t] ~= mean + sum_i scale[i] * C[t, i] * B[i]`. Every section starts on 16 bytes, every head
record on 128. The page holds no position: keys are stored before RoPE (`rope="pre"`) or as they
came (`rope="post"`), so the same block gives the same bytes wherever the page lies in memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

from spectral_paged.errors import FormatError
from spectral_paged.kernels.layout import (
    BLOCK_TOKENS,
    EXACT_PAGE_TOKENS,
    UNIT_BYTES,
    PageLayout,
    SideLayout,
    exact_page_bytes,
)

Bands = tuple[tuple[int, int], ...]
Decomposition = Literal["gram", "randomized"]
TokenWeighting = Literal["none", "attention"]
DimWeighting = Literal["none", "query-energy"]

# Ranks K/V of the reference format by head width.
REFERENCE_RANKS = {64: (16, 32), 96: (32, 48), 128: (32, 64), 256: (48, 96)}


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


@dataclass(frozen=True)
class PageFormat:
    """Everything that fixes a page's bytes and meaning. Frozen; two equal formats share pages.

    Args:
        name: a label for reports; not part of the fingerprint.
        num_kv_heads, head_dim: geometry of the model's K and V.
        k_bands, v_bands: `((count, bits), ...)` in component order, counts multiples of 16;
            empty for the `exact` format, which never seals. This version stores 8-bit bands.
        basis: where the basis lives; `page` in this version.
        rope: keys stored before (`pre`) or after (`post`) rotation.
        mean: subtract the page mean of K and of V before the decomposition and store it in fp16.
        gain: per-token gain; not in this version.
        num_landmark_tokens: first tokens of a sequence kept exact for ever; multiple of 64.
        hot_tokens: newest tokens that are never sealed; multiple of 64.
        prefill_segment: prompt tokens whose queries see each other exactly; multiple of 512.
        decomposition: `gram` (eigenvectors of the D x D Gram matrix) or `randomized` (Halko,
            Martinsson, Tropp 2011: Gaussian sketch with power iterations).
        token_weighting: `attention` weighs tokens by the attention mass of the block's last
            queries; needs the queries at seal time.
        dim_weighting: `query-energy` weighs K's dimensions by the energy of the block's queries.

    Raises:
        FormatError: a value breaks the kernel contract; the message names it and the limit.
    """

    name: str
    num_kv_heads: int
    head_dim: int
    k_bands: Bands = ()
    v_bands: Bands = ()
    basis: Literal["page", "shared"] = "page"
    rope: Literal["pre", "post"] = "pre"
    mean: bool = True
    gain: bool = False
    num_landmark_tokens: int = 64
    hot_tokens: int = 64
    prefill_segment: int = 2048
    decomposition: Decomposition = "gram"
    token_weighting: TokenWeighting = "none"
    dim_weighting: DimWeighting = "none"

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
        if self.basis not in ("page", "shared") or self.rope not in ("pre", "post"):
            raise FormatError(
                f"basis is {self.basis!r}, use 'page'; rope is {self.rope!r}, use 'pre' or 'post'"
            )
        if self.basis == "shared":
            raise FormatError("basis='shared' is not in this version; use basis='page'")
        if self.gain:
            raise FormatError("gain=True is not in this version; use gain=False")
        for field, value, step, low in (
            ("num_landmark_tokens", self.num_landmark_tokens, EXACT_PAGE_TOKENS, 0),
            ("hot_tokens", self.hot_tokens, EXACT_PAGE_TOKENS, 0),
            ("prefill_segment", self.prefill_segment, BLOCK_TOKENS, BLOCK_TOKENS),
        ):
            if value < low or value % step:
                raise FormatError(
                    f"{field} is {value}; it must be a multiple of {step}, at least {low}: "
                    f"use {max(low, _align(max(value, 0), step))}"
                )
        if self.decomposition not in ("gram", "randomized"):
            raise FormatError(f"decomposition {self.decomposition!r}: use 'gram' or 'randomized'")
        if self.token_weighting not in ("none", "attention"):
            raise FormatError(f"token_weighting {self.token_weighting!r}: 'none' or 'attention'")
        if self.dim_weighting not in ("none", "query-energy"):
            raise FormatError(f"dim_weighting {self.dim_weighting!r}: 'none' or 'query-energy'")

    def _check_bands(self, side: str, bands: Bands) -> None:
        for count, bits in bands:
            if count < 16 or count % 16:
                raise FormatError(
                    f"{side} has a band of {count} components; counts are multiples of 16"
                )
            if bits != 8:
                raise FormatError(f"{side} has a {bits}-bit band; this version stores 8-bit bands")
        rank = sum(count for count, _ in bands)
        if rank > self.head_dim:
            raise FormatError(
                f"{side} has rank {rank} but head_dim is {self.head_dim}: "
                f"a head has no more than {self.head_dim} components, lower the rank"
            )

    # ---- meaning -------------------------------------------------------------------------

    @property
    def seals(self) -> bool:
        """False for `exact`: blocks never become pages."""
        return bool(self.k_bands)

    @property
    def k_rank(self) -> int:
        return sum(count for count, _ in self.k_bands)

    @property
    def v_rank(self) -> int:
        return sum(count for count, _ in self.v_bands)

    @property
    def needs_queries(self) -> bool:
        """True where sealing reads the block's own queries."""
        return self.token_weighting != "none" or self.dim_weighting != "none"

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over every field but the name; enters every prefix hash."""
        fields = asdict(self)
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def visible_blocks(self, position: int, num_prompt_tokens: int) -> int:
        """Number of leading blocks that the query at `position` sees as pages.

        Block b counts if and only if `s(t) >= landmarks + 512 (b + 1) + hot`, with s(t) = t for
        a generated token and the start of the token's segment for a prompt token.
        """
        if not self.seals:
            return 0
        past = position - self.num_landmark_tokens
        if position < num_prompt_tokens:
            past = max(past, 0) // self.prefill_segment * self.prefill_segment
        return max(0, (past - self.hot_tokens) // BLOCK_TOKENS)

    def chunk_end(self, start: int, num_prompt_tokens: int) -> int:
        """First position after `start` whose query sees another number of pages than `start`.

        Queries of one step stay inside `[start, chunk_end)`, so that one step has one view.
        """
        if not self.seals:
            return 1 << 62
        landmarks, segment = self.num_landmark_tokens, self.prefill_segment
        blocks = self.visible_blocks(start, num_prompt_tokens)
        end = landmarks + self.hot_tokens + BLOCK_TOKENS * (blocks + 1)  # while generating
        if start < num_prompt_tokens:
            past = max(start - landmarks, 0)
            segment_end = landmarks + (past // segment + 1) * segment
            while segment_end < num_prompt_tokens:
                if self.visible_blocks(segment_end, num_prompt_tokens) != blocks:
                    return segment_end
                segment_end += segment
            # the first generated token may see more pages than the last prompt token
            if self.visible_blocks(num_prompt_tokens, num_prompt_tokens) != blocks:
                return num_prompt_tokens
        return end

    # ---- bytes ---------------------------------------------------------------------------

    @cached_property
    def layout(self) -> PageLayout:
        """Byte offsets for the kernels. Raises FormatError for `exact`, which has no pages."""
        if not self.seals:
            raise FormatError("the exact format has no pages, so it has no page layout")
        k, k_end = self._side(0, self.k_rank)
        v, v_end = self._side(k_end, self.v_rank)
        head_bytes = _align(v_end, UNIT_BYTES)
        return PageLayout(
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            head_bytes=head_bytes,
            page_bytes=head_bytes * self.num_kv_heads,
            rotate_keys=self.rope == "pre",
            k=k,
            v=v,
        )

    def _side(self, start: int, rank: int) -> tuple[SideLayout, int]:
        basis = start + BLOCK_TOKENS * rank
        scale = basis + rank * self.head_dim
        mean = scale + 4 * rank
        end = mean + (2 * self.head_dim if self.mean else 0)
        side = SideLayout(
            rank=rank,
            coeff_offset=start,
            basis_offset=basis,
            scale_offset=scale,
            mean_offset=mean if self.mean else -1,
        )
        return side, _align(end, 16)

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

    # ---- presets -------------------------------------------------------------------------

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        num_kv_heads: int,
        head_dim: int,
        prefill_segment: int = 2048,
    ) -> PageFormat:
        """The preset `name` for a model's geometry.

        Raises:
            FormatError: unknown preset, or a head width it has no ranks for.
        """
        if name == "auto":
            name = "spectral-int8"
        if name == "exact":
            return cls(name, num_kv_heads, head_dim, prefill_segment=prefill_segment)
        if name not in PRESETS:
            raise FormatError(
                f"unknown kv_format {name!r}; presets are 'auto', {', '.join(map(repr, PRESETS))}"
            )
        if head_dim in REFERENCE_RANKS:
            k_rank, v_rank = REFERENCE_RANKS[head_dim]
        elif head_dim < 64:
            k_rank, v_rank = max(16, head_dim // 64 * 16), max(16, head_dim // 32 * 16)
        else:
            raise FormatError(
                f"preset {name!r} has no ranks for head_dim {head_dim}; it knows "
                f"{sorted(REFERENCE_RANKS)}: pass a PageFormat with ranks of your own"
            )
        return cls(
            name,
            num_kv_heads,
            head_dim,
            k_bands=((k_rank, 8),),
            v_bands=((v_rank, 8),),
            rope="post" if name == "spectral-int8-post" else "pre",
            prefill_segment=prefill_segment,
        )

    def with_ranks(self, k_rank: int, v_rank: int) -> PageFormat:
        """The same format with other 8-bit ranks (multiples of 16)."""
        return replace(
            self,
            name=f"{self.name}-{k_rank}-{v_rank}",
            k_bands=((k_rank, 8),),
            v_bands=((v_rank, 8),),
        )


PRESETS = ("exact", "spectral-int8", "spectral-int8-post")
