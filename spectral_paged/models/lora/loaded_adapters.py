"""The LoRA adapters of a running model: loaded by name, held by requests, and unloaded."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from spectral_paged.errors import AdapterError, UnsupportedModelError, shown, suggestion
from spectral_paged.models.linear_weights import is_linear
from spectral_paged.models.lora.adapter_config import MERGE, check_rank
from spectral_paged.models.lora.adapter_files import read_folder
from spectral_paged.models.lora.adapter_weights import AdapterWeights
from spectral_paged.models.lora.lora_linear import LoRALinear, TokenAdapters
from spectral_paged.models.lora.peft_model import PeftAdapters
from spectral_paged.options import LoRARequest
from spectral_paged.pool.weak_method import WeakMethod

ALIGNMENT = 8  # elements; grouped products take rows at multiples of 16 bytes
STACKED_WIDTH = 256  # ranks of all adapters together up to which the stacked form is taken
Factors = Mapping[str, tuple[Tensor, Tensor]]  # by layer, as `LayerAdapter.factors` has them


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """An adapter that is loaded, or waits in host memory for a place.

    Attributes:
        request: its name, id and path.
        key: 64 hex digits of name, id and content, which separate what is cached.
        stays: it gives way to no other.
        factors: what its place gets; empty once it has one.
        find_place: gives it a place, if one is free.
        settle: takes what no request has any more.
        index: its place in the stacked tensors, at least 1; 0: it has none yet.
        num_requests: requests that hold it.
        last_use: a number that grows with every request.
        removed: its name is forgotten; requests that hold it go on.
    """

    request: LoRARequest
    key: str
    stays: bool
    factors: Factors
    find_place: Callable[[LoadedAdapter], bool]
    settle: Callable[[LoadedAdapter], None]
    index: int = 0
    num_requests: int = 0
    last_use: int = 0
    removed: bool = False

    def place(self) -> bool:
        """Return whether it has a place, which it takes now if one is free."""
        return bool(self.index) or self.find_place(self)

    def release(self) -> None:
        """End one request's hold."""
        self.num_requests -= 1
        if not self.num_requests:
            self.settle(self)


class LoadedAdapters:
    """The adapters of one model, whose linear layers are replaced until `close`.

    Args:
        model: of transformers, on its device.
        max_loras: adapters that are loaded at a time.
        max_lora_rank: the highest rank.
        peft: adapters that are in the model's layers; they are loaded by their names.

    Raises:
        UnsupportedModelError: another `LLM` has adapters in the model.
        AdapterError: an adapter of `peft` is not served, or there is no room for all.
    """

    def __init__(
        self, model: Any, *, max_loras: int, max_lora_rank: int, peft: PeftAdapters | None = None
    ) -> None:
        if any(isinstance(part, LoRALinear) for part in model.modules()):
            raise UnsupportedModelError(
                "the model has adapters of another LLM: close that first, or load them there"
            )
        found = {} if peft is None else peft.read(max_lora_rank)
        self.max_loras, self.max_lora_rank = max_loras, max_lora_rank
        self._model = model
        self._by_name: dict[str, LoadedAdapter] = {}
        self._waiting: set[LoadedAdapter] = set()  # without a place
        self._free = list(range(max_loras, 0, -1))
        self._uses = itertools.count(1)
        if peft is not None:
            peft.take_out(model)
        linears = {
            f"model.layers.{name}": part
            for name, part in model.model.layers.named_modules()
            if is_linear(part)
        }
        self.close = finalize(self, _put_back, ref(model), linears, peft)  # restores it, once
        self.close.atexit = False
        try:
            self.tokens, self._layers = _with_adapters(model, linears, max_loras, max_lora_rank)
            self._put_in()
            for number, (name, weights) in enumerate(found.items(), start=1):
                self.add(LoRARequest(name, number), weights)
        except BaseException:
            self.close()
            raise

    # ---- by name -------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    @property
    def requests(self) -> list[LoRARequest]:
        """Return the names, ids and paths of all that are loaded."""
        return [adapter.request for adapter in list(self._by_name.values())]  # of any thread

    def named(self, name: str) -> LoRARequest:
        """Return the name and id of an adapter that is loaded.

        Without the path, because a request that still names it once it is unloaded would load it
        again.

        Raises:
            AdapterError: none has the name.
        """
        known = self._by_name.get(name)
        if known is not None:
            return replace(known.request, lora_path="")
        names = self.names
        meant = suggestion(name, names) or f"loaded are {', '.join(map(repr, names)) or 'none'}"
        raise AdapterError(f"adapter {shown(name)} is not loaded: {meant}")

    def next_id(self) -> int:
        """Return an id that no adapter has."""
        taken = {adapter.request.lora_int_id for adapter in self._by_name.values()}
        return next(number for number in itertools.count(1) if number not in taken)

    def hold(self, request: LoRARequest, *, waits: bool = False) -> LoadedAdapter:
        """Return an adapter, loaded if need be, which stays until the request releases it.

        Args:
            waits: while all places are in use, it is held without one.

        Raises:
            AdapterError: it is unknown, not served or damaged, its name or id is another's, or all
                places are in use, with `waits` by adapters that stay.
        """
        adapter = self._by_name.get(request.lora_name)
        if adapter is None:
            adapter = self._made(request, self.read(request), stays=False)
        else:
            self._check_same(adapter.request, request)
        queued = waits and bool(self._waiting) and not adapter.index  # behind those that wait
        if queued or not adapter.place():
            if not waits or self._num_staying >= self.max_loras:
                raise self._no_place(request.lora_name)
            self._waiting.add(adapter)
        self._by_name[request.lora_name] = adapter
        adapter.num_requests += 1
        adapter.last_use = next(self._uses)
        return adapter

    def read(self, request: LoRARequest) -> AdapterWeights:
        """Return the weights in an adapter's folder; nothing is loaded.

        Raises:
            AdapterError: it is not served or damaged.
        """
        if not request.lora_path:
            self.named(request.lora_name)
        return read_folder(request.lora_name, request.lora_path, self.max_lora_rank)

    def add(self, request: LoRARequest, weights: AdapterWeights) -> LoadedAdapter:
        """Load an adapter under a new name, which gives way to no other.

        Raises:
            AdapterError: name or id is another's, a layer is not served, or there is no room. All
                that was loaded stays.
        """
        adapter = self._made(request, weights, stays=True)
        self._check_staying(request.lora_name)
        if not adapter.place():
            raise self._no_place(request.lora_name)
        self._by_name[request.lora_name] = adapter
        return adapter

    def load(self, request: LoRARequest) -> bool:
        """Load an adapter that stays; False: it is loaded already.

        Raises:
            AdapterError: as `read` and `add`.
        """
        if not isinstance(request, LoRARequest):
            raise AdapterError(f"{shown(request)} is no adapter: give LoRARequest(name, id, path)")
        known = self._by_name.get(request.lora_name)
        if known is not None and known.request == request:
            self._check_staying(request.lora_name)
            if not known.place():
                raise self._no_place(request.lora_name)
            known.stays = True
            return False
        self.add(request, self.read(request))
        return True

    def unload(self, lora_int_id: int) -> bool:
        """Forget the adapter of an id, as `remove` does; False: none has it."""
        names = [r.lora_name for r in self.requests if r.lora_int_id == lora_int_id]
        for name in names:
            self.remove(name)
        return bool(names)

    def remove(self, name: str) -> None:
        """Forget a name; requests that have the adapter end with it.

        Raises:
            AdapterError: none has the name.
        """
        self.named(name)
        adapter = self._by_name.pop(name)
        adapter.removed = True
        self._settle(adapter)

    # ---- the model -----------------------------------------------------------------------

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Have the model without adapters inside a `with` block: its own layers, by their names."""
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer.base)
        try:
            yield
        finally:
            self._put_in()

    def _put_in(self) -> None:
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer)

    @contextmanager
    def busiest(self, num_tokens: int) -> Iterator[None]:
        """Run a step of so many tokens as if all had adapters, to measure what that takes."""
        device = self._model.device
        with self.tokens.of(torch.zeros(num_tokens, dtype=torch.int32, device=device)):
            yield

    @property
    def num_bytes(self) -> int:
        """Bytes of the stacked tensors."""
        return sum(layer.a.nbytes + layer.b.nbytes for layer in self._layers.values())

    # ---- parts ---------------------------------------------------------------------------

    def _check_same(self, known: LoRARequest, asked: LoRARequest) -> None:
        same_path = asked.lora_path in ("", known.lora_path)
        if asked.lora_int_id != known.lora_int_id or not same_path:
            raise AdapterError(
                f"adapter {shown(known.lora_name)} is loaded with id {known.lora_int_id} from "
                f"{shown(known.lora_path)}, and {shown(asked)} is asked for: give the same, or "
                "unload it first"
            )

    @torch.no_grad()
    def _factors(self, name: str, weights: AdapterWeights) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what each layer gets of an adapter, in the layer's dtype and on the CPU.

        Raises:
            AdapterError: the model has no such layer, or none of these sizes, or numbers are too
                large for its dtype.
        """
        found = {}
        for where, adapter in weights.layers.items():
            layer = self._layers.get(where)
            if layer is None:
                served = sorted({known.rpartition(".")[2] for known in self._layers})
                raise AdapterError(
                    f"adapter {shown(name)} targets {shown(where)}, which is no linear layer "
                    f"of this model's decoder layers ({', '.join(served)}): train an adapter for "
                    f"those, or {MERGE}"
                )
            wanted = layer.out_features, layer.in_features
            shape = len(adapter.b), adapter.a.shape[1]
            if shape != wanted:
                raise AdapterError(
                    f"adapter {shown(name)} is made for {shape[0]} x {shape[1]} weights in "
                    f"{where}, and this model has {wanted[0]} x {wanted[1]}: take the adapter of "
                    "this model"
                )
            found[where] = adapter.factors(layer.a.dtype)
            if not all(torch.isfinite(factor).all() for factor in found[where]):
                raise AdapterError(
                    f"adapter {shown(name)} has numbers in {where} that are too large for the "
                    f"model's {layer.a.dtype}, alpha over rank being {adapter.scale:.3g}: check "
                    "its lora_alpha, or train it again"
                )
        return found

    def _made(self, request: LoRARequest, weights: AdapterWeights, *, stays: bool) -> LoadedAdapter:
        """Return an adapter under a new name, without a place.

        Raises:
            AdapterError: name or id is another's, or a layer is not served.
        """
        name = request.lora_name
        for known in self._by_name.values():
            if known.request.lora_name == name or known.request.lora_int_id == request.lora_int_id:
                raise AdapterError(
                    f"adapter {shown(name)} with id {request.lora_int_id}: "
                    f"{shown(known.request.lora_name)} with id {known.request.lora_int_id} is "
                    "loaded: give another name and id, or unload that first"
                )
        check_rank(name, weights.rank, self.max_lora_rank)
        key, factors = _key(request, weights), self._factors(name, weights)
        find, settle = WeakMethod(self._find_place), WeakMethod(self._settle)
        return LoadedAdapter(request, key, stays, factors, find, settle)

    @property
    def _num_staying(self) -> int:
        return sum(known.stays for known in self._by_name.values())

    def _check_staying(self, name: str) -> None:
        """Refuse that one more stays, where requests would wait for ever."""
        known = self._by_name.get(name)
        more = known is None or not known.stays
        if self._waiting and more and self._num_staying + 1 >= self.max_loras:
            raise self._no_place(name)

    def _no_place(self, name: str) -> AdapterError:
        return AdapterError(
            f"adapter {shown(name)} finds no place: max_loras is {self.max_loras}, and "
            f"{', '.join(map(repr, self.names)) or 'adapters that end'} are loaded for "
            f"good or in use: raise max_loras, unload one, or ask again later"
        )

    def _find_place(self, adapter: LoadedAdapter) -> bool:
        """Write an adapter into a place that is free, or that one without requests has."""
        if any(not layer.a.untyped_storage().nbytes() for layer in self._layers.values()):
            return False  # the model sleeps, and its tensors have no memory
        if not self._free:
            idle = [
                known
                for known in self._by_name.values()
                if known.index and not known.num_requests and not known.stays
            ]
            if not idle:
                return False
            self.remove(min(idle, key=lambda known: known.last_use).request.lora_name)
        index = self._free.pop()
        try:
            for where, layer in self._layers.items():
                layer.write(index, adapter.factors.get(where))
        except BaseException:
            self._free.append(index)
            raise
        adapter.index, adapter.factors = index, {}
        self._waiting.discard(adapter)
        return True

    def _settle(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter without a place, and free the place of one that is removed."""
        if adapter.num_requests:
            return
        if adapter.removed and adapter.index:
            self._free.append(adapter.index)
        elif not adapter.index:
            self._waiting.discard(adapter)
            if not adapter.removed:  # else the name may be another's
                del self._by_name[adapter.request.lora_name]


def of_llm(adapters: LoadedAdapters | None) -> LoadedAdapters:
    """Return the adapters of an LLM.

    Raises:
        AdapterError: it has room for none.
    """
    if adapters is None:
        raise AdapterError("there is room for no adapter: make the LLM with enable_lora=True")
    return adapters


def _with_adapters(
    model: Any, linears: Mapping[str, Any], max_loras: int, max_lora_rank: int
) -> tuple[TokenAdapters, dict[str, LoRALinear]]:
    """Return layers with places for adapters around a model's linear layers."""
    device, dtype = model.device, model.dtype
    rank = -(-max_lora_rank // ALIGNMENT) * ALIGNMENT
    widths = [w for part in linears.values() for w in (part.in_features, part.out_features)]
    grouped = rank * max_loras > STACKED_WIDTH and _has_grouped(device, dtype, widths)
    tokens = TokenAdapters(max_loras, rank, device, grouped=grouped)
    return tokens, {
        name: LoRALinear(part, tokens, max_loras, rank, device=device, dtype=dtype)
        for name, part in linears.items()
    }


def _put_back(
    reference: ref[Any], layers: Mapping[str, nn.Module], peft: PeftAdapters | None
) -> None:
    """Give a model its own layers back, if it is still there."""
    model = reference()
    if model is None:
        return
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    if peft is not None:
        peft.put_back(model)


def _key(request: LoRARequest, weights: AdapterWeights) -> str:
    whole = repr((request.lora_name, request.lora_int_id, weights.digest))
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


def _has_grouped(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Return whether torch has a kernel of grouped products that needs no wait of the host."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    aligned = all(width % ALIGNMENT == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(device) >= (9, 0)
