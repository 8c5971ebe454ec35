"""The tensors in which a model's weights are stored, those that quantized weights hide too.

```
parameters, buffers     themselves
tensor subclasses       the tensors inside (torchao, quanto)
bitsandbytes            scales that hang on a weight or on its layer, and are in no list of either
```
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def stored_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors; a tensor that is shared comes once, under its first name."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield from _inside(name, tensor)
    for name, module in model.named_modules():
        yield from _beside(f"{name}.weight", module)


def stored_bytes(model: Any) -> int:
    """Return the bytes of a model's weights: of all that a checkpoint of it would have."""
    passing = {
        f"{name}.{buffer}".removeprefix(".")
        for name, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
    }
    return sum(tensor.nbytes for name, tensor in stored_tensors(model) if name not in passing)


def _inside(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a plain tensor, or those of which a subclass is made."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _inside(f"{name}.{part}", getattr(tensor, part))


def _beside(name: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the scales of a layer of bitsandbytes: those of 4 bits, or those of 8."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    while state is not None:  # the scales may have scales of their own
        name = f"{name}.quant_state"
        for part in ("absmax", "code", "offset"):
            if isinstance(found := getattr(state, part, None), Tensor):
                yield f"{name}.{part}", found
        state = getattr(state, "state2", None)
    for holder in (weight, getattr(module, "state", None)):  # its first product moves them
        if isinstance(scales := getattr(holder, "SCB", None), Tensor):
            yield f"{name}.SCB", scales
