"""A model's rotary table rotates keys and queries and undoes the rotation exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.errors import UnsupportedModelError
from spectral_paged.kernels.math.rotary import rotate


@dataclass(frozen=True, eq=False)  # layers of one table are known by its identity
class RotaryTable:
    """cos and sin for positions 0..max_positions-1, fp32 `[max_positions, rotary_dim / 2]`.

    Half-split convention: dimension i pairs with i + rotary_dim / 2; dimensions past rotary_dim
    pass through. With `interleaved`, dimension 2i pairs with 2i + 1 (Cohere). cos and sin may both
    contain the model's attention factor s (YaRN).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def from_inv_freq(
        cls,
        inv_freq: Tensor,
        *,
        max_positions: int,
        attention_scaling: float = 1.0,
        interleaved: bool = False,
        device: torch.device | str = "cpu",
    ) -> RotaryTable:
        """A table for inverse frequencies `[rotary_dim / 2]` (radians per token).

        Raises:
            UnsupportedModelError: inverse frequencies are not a finite vector.
        """
        freq = inv_freq.detach().float().to(device)
        if freq.dim() != 1 or not bool(torch.isfinite(freq).all()):
            raise UnsupportedModelError(
                f"inverse frequencies of shape {list(freq.shape)} are not a finite vector; "
                "pass the model's rotary_emb.inv_freq"
            )
        angle = torch.arange(max_positions, device=device).float().unsqueeze(-1) * freq
        cos, sin = angle.cos() * attention_scaling, angle.sin() * attention_scaling
        return cls(cos, sin, interleaved)

    @classmethod
    def from_theta(
        cls, theta: float, head_dim: int, *, max_positions: int, device: torch.device | str = "cpu"
    ) -> RotaryTable:
        """A table of plain RoPE (Su et al. 2021) with base `theta` over the whole head."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return cls.from_inv_freq(theta**-exponent, max_positions=max_positions, device=device)

    @property
    def max_positions(self) -> int:
        return self.cos.shape[0]

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cos.shape[-1]

    def to(self, device: torch.device) -> RotaryTable:
        """The table on `device`."""
        return RotaryTable(self.cos.to(device), self.sin.to(device), self.interleaved)

    def halves(self, x: Tensor) -> Tensor:
        """`x` `[..., D]` in the half-split convention. Interleaved pairs become two halves, first
        members before second ones; products of a query and a key so ordered stay the same."""
        if not self.interleaved:
            return x
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat((turned[..., ::2], turned[..., 1::2], rest), dim=-1)

    def pairs(self, x: Tensor) -> Tensor:
        """The inverse of `halves`: `x` `[..., D]` in the model's own order."""
        if not self.interleaved:
            return x
        half = self.rotary_dim // 2
        pairs = torch.stack((x[..., :half], x[..., half : 2 * half]), dim=-1).flatten(-2)
        return torch.cat((pairs, x[..., 2 * half :]), dim=-1)

    def rows(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of 1-D `[T]` or 2-D `[1, T]` position ids, as `[T, 1, rotary_dim / 2]`."""
        flat = position_ids.reshape(-1)
        return self.cos[flat].unsqueeze(1), self.sin[flat].unsqueeze(1)

    def apply(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Rotate `x` `[T, H, D]`; the result is fp32."""
        return self.pairs(rotate(self.halves(x), *self.rows(position_ids)))

    def undo(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Un-rotate `x` `[T, H, D]`, exactly up to fp32 rounding; the result is fp32."""
        return self.pairs(rotate(self.halves(x), *self.rows(position_ids), inverse=True))
