"""A linear layer with the LoRA adapters of several requests, each token with its own.

```
index   0                1                   ...  max_loras
a       zeros            A [rank, in]        ...              [max_loras + 1, R, in]
b       zeros            (scale B)^T         ...              [max_loras + 1, R, out]

output of a token with adapter i:  base(x) + (x a[i]^T) b[i]
```

The tensors are made once, and an adapter is written into its place, so that compiled layers and
captured graphs stay valid. A rank below R leaves zeros. Tokens without an adapter have index 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenAdapters:
    """The adapter of each token of the step that runs, which all layers of a model read.

    Two forms of the products give the same sums:

    - stacked: every token times the A of all adapters, the products with other tokens' adapters set
      to zero, times all B. Two products of fixed shape, for few adapters of low rank.
    - grouped: tokens sorted by adapter, and grouped products over the runs.

    Args:
        max_loras: adapters at a time.
        rank: R, the rank that all are padded to.
        grouped: which form.

    Attributes:
        active: a token has an adapter; otherwise layers skip the products.
    """

    def __init__(self, max_loras: int, rank: int, device: torch.device, *, grouped: bool) -> None:
        self.active = False
        self.grouped = grouped
        numbers = torch.arange(max_loras + 1, device=device)
        self._numbers = numbers
        self._columns = numbers[1:].repeat_interleave(rank)
        self.own = torch.empty(0, 0, dtype=torch.bool, device=device)
        self.order = self.inverse = self.ends = torch.empty(0, dtype=torch.int32, device=device)

    @contextmanager
    def of(self, indices: Tensor) -> Iterator[None]:
        """Let layers add adapters inside a `with` block: `indices`, int `[T]`, one a token."""
        if self.grouped:
            self.order = torch.sort(indices, stable=True).indices
            self.inverse = torch.argsort(self.order)
            counts = (indices[:, None] == self._numbers).sum(dim=0)
            self.ends = counts.cumsum(dim=0).to(torch.int32)
        else:
            self.own = indices[:, None] == self._columns
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def add(self, output: Tensor, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return `output`, `[T, out]`, plus the products of `inputs`, `[T, in]`, with adapters."""
        if self.grouped:
            sorted_inputs = inputs[self.order]
            inner = F.grouped_mm(sorted_inputs, a.transpose(-2, -1), offs=self.ends)
            return output + F.grouped_mm(inner, b, offs=self.ends)[self.inverse]
        inner = F.linear(inputs, a[1:].flatten(0, 1))
        # no product with 0, because what overflows with another's adapter would be NaN
        inner = torch.where(
            self.own, inner, torch.zeros((), dtype=inner.dtype, device=inner.device)
        )
        return torch.addmm(output, inner, b[1:].flatten(0, 1))


class LoRALinear(nn.Module):
    """A linear layer, `base`, to whose output the products of tokens' adapters are added.

    Args:
        base: has `in_features` and `out_features`; it is not changed.
        tokens: the adapters of the step's tokens.
        max_loras, rank: as `TokenAdapters` has them.
        dtype: of activations, and of the adapters here.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        base: Any,
        tokens: TokenAdapters,
        max_loras: int,
        rank: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base, self.tokens = base, tokens
        self.in_features, self.out_features = base.in_features, base.out_features
        for name, width in (("a", self.in_features), ("b", self.out_features)):
            stack = torch.zeros(max_loras + 1, rank, width, device=device, dtype=dtype)
            self.register_buffer(name, stack, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.base(inputs)
        if not self.tokens.active:
            return output
        flat, rows = output.flatten(0, -2), inputs.flatten(0, -2)
        return self.tokens.add(flat, rows, self.a, self.b).view_as(output)

    def write(self, index: int, factors: tuple[Tensor, Tensor] | None) -> None:
        """Put an adapter's A, `[r, in]`, and `scale` B^T, `[r, out]`, at `index`; None: it has none
        here. Factors of the layer's own dtype take no memory on its device."""
        for stack, own in zip((self.a, self.b), factors or (None, None), strict=True):
            stack[index].zero_()
            if own is not None:
                stack[index, : len(own)].copy_(own)
