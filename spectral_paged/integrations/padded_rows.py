"""The tokens of a padded batch, and its conversion to a flat batch and back.

transformers computes `[B, T]` columns a forward, and `attention_mask` `[B, all columns so far]`
marks the columns that are tokens. The cache stores only tokens, so a row's landmarks are its first
tokens, and positions count from the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_paged.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """The columns of one forward, B rows of T (`width`), behind `num_columns` of earlier ones.

    num_new: tokens of each row in this forward.
    places: int64, the places of tokens in the flattened `[B * T]`; None: all places are tokens.
    shown: bool `[B, all columns]`, True for tokens; None: all columns are tokens.
    position_ids: int64 `[B, T]`, 0 where there is no token.
    """

    batch_size: int
    width: int
    num_columns: int
    num_new: tuple[int, ...]
    places: Tensor | None
    shown: Tensor | None
    position_ids: Tensor

    @classmethod
    def of(
        cls,
        batch_size: int,
        width: int,
        stored: list[int],
        num_columns: int,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        device: torch.device,
    ) -> PaddedRows:
        """The columns of a forward, from its mask and positions.

        Args:
            stored: tokens of each row that are stored before the forward.
            num_columns: columns before the forward.

        Raises:
            InvalidRequestError: the mask or positions contradict the stored tokens.
        """
        if attention_mask is None and min(stored) < num_columns:
            raise InvalidRequestError(
                "earlier forwards had an attention_mask with padding and this one has none: pass "
                f"the mask of all {num_columns + width} columns, or call reset() before another "
                "prompt"
            )
        shown = None
        if attention_mask is not None:
            expected = batch_size, num_columns + width
            shape = tuple(getattr(attention_mask, "shape", ()))  # a dict of ready masks has none
            if shape != expected:
                raise InvalidRequestError(
                    f"attention_mask is {list(shape)}; the cache holds "
                    f"{num_columns} columns and {width} are new, so it takes {list(expected)}: "
                    "pass the mask of the whole conversation, or call reset() before another prompt"
                )
            shown = attention_mask.to(device=device, dtype=torch.bool)
        held = torch.tensor(stored, device=device)[:, None]
        new = (
            torch.ones(batch_size, width, dtype=torch.bool, device=device)
            if shown is None
            else shown[:, num_columns:]
        )
        before = held if shown is None else shown[:, :num_columns].sum(1, keepdim=True)
        positions = (held + new.cumsum(1) - 1).masked_fill(~new, 0)
        given = positions if position_ids is None else position_ids.to(device)
        wrong = ((given != positions) & new).any(1, keepdim=True)
        # one copy to the host a forward
        facts = torch.cat([before, new.sum(1, keepdim=True), wrong], dim=1).tolist()
        for row, (earlier, _, misplaced) in enumerate(facts):
            if earlier != stored[row]:
                raise InvalidRequestError(
                    f"attention_mask shows {earlier} earlier tokens in row {row}, the cache stored "
                    f"{stored[row]}: what was stored cannot be hidden (generate stores what it "
                    "appends to a finished row, too), keep the mask's columns or call reset()"
                )
            if misplaced:
                if shown is not None and _has_later_pads(shown[row]):
                    raise InvalidRequestError(
                        f"row {row} is padded on the right, so generate would go on from a pad: "
                        "pad on the left (padding_side='left' of the tokenizer)"
                    )
                raise InvalidRequestError(
                    f"position_ids of row {row} do not count its tokens from 0: leave them out, or "
                    "pass attention_mask.cumsum(-1) - 1"
                )
        num_new = tuple(count for _, count, _ in facts)
        full = sum(num_new) == batch_size * width
        places = None if full else new.flatten().nonzero().squeeze(1)
        return cls(batch_size, width, num_columns, num_new, places, shown, positions)

    def flatten(self, x: Tensor) -> Tensor:
        """The tokens of `x` `[B, H, T, D]` behind each other, `[tokens, H, D]`."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if self.places is None else flat[self.places]

    def unflatten(self, x: Tensor) -> Tensor:
        """The flat `x` `[tokens, H, D]` as `[B, T, H, D]`, zero where there is no token."""
        if self.places is not None:
            padded = x.new_zeros(self.batch_size * self.width, *x.shape[1:])
            padded[self.places] = x
            x = padded
        return x.unflatten(0, (self.batch_size, self.width))

    def columns(self, stored: dict[int, Tensor], like: Tensor) -> Tensor:
        """The newest tokens of each row, in their columns: `[B, H, columns, D]`, zero elsewhere.

        `stored` has `[H, tokens, D]` by row. The result has `like`'s dtype.
        """
        width = self.width + self.num_columns
        found = like.new_zeros(self.batch_size, like.shape[1], width, like.shape[3])
        for row, x in stored.items():
            if self.shown is None:
                found[row, :, width - x.shape[1] :] = x
            else:
                places = self.shown[row].nonzero().squeeze(1)
                found[row, :, places[len(places) - x.shape[1] :]] = x
        return found


def _has_later_pads(shown: Tensor) -> bool:
    """True if a column without a token follows one with a token; `shown` is bool `[columns]`."""
    return bool((shown[:-1] & ~shown[1:]).any())


def left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Prompts padded on the left: `input_ids` and `attention_mask`, int64 `[prompts, longest]`.

    Pads are zeros in both.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
