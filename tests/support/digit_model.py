"""A model of integers whose every token depends on every K and V that it reads back.

A token's K and V are small integers ("digits"), so that even lossy pages return them exactly.

```
layer 0   digits(t) = f(token, position, salt, view)              view: the blocks t sees as pages
layer 1   digits(t) = f(everything layer 0 holds up to t, ...)    as a model's second layer would
next      token     = f(everything layer 1 holds up to t)
```

One stale, lost or wrongly shared value anywhere changes the token. `Script` computes the same
tokens from the token ids, without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from spectral_paged.cache import Visibility, pinned_blocks
from spectral_paged.engine.requests import seed_of
from spectral_paged.kernels.decode.batch import Basis
from spectral_paged.kernels.exact.reference import exact_gather
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, UNIT_BYTES
from spectral_paged.pages import PageFormat
from spectral_paged.rope import RotaryTable
from spectral_paged.sampling.sampler import uniform_noise
from support.cache_feed import slots_of

LAYERS, DIM, VOCAB, EOS = 2, 16, 97, 96
LONGEST = 2100
SLICE = 33  # rows of logits that a visitor is shown at once
DIGITS = 4  # of K, and as many of V, in the first elements of a head
ROPE = RotaryTable.from_theta(10000.0, DIM, max_positions=LONGEST)
LIKELY, SECOND, NEVER = 2.0, 1.5, -50.0  # logits: two tokens are possible, one wins when greedy
_SHIFTS = np.arange(2 * DIGITS, dtype=np.uint64) * np.uint64(4)
_WEIGHTS = np.random.default_rng(11).integers(
    1 << 63, size=(LAYERS, LONGEST, 2 * DIGITS), dtype=np.uint64
)


def formats():
    """Formats by name: keys after RoPE, relative to frames, no landmarks or hot tokens, exact."""
    full = {"k_bands": ((DIM, 8),), "v_bands": ((DIM, 8),), "prefill_segment": 512}
    fields = {
        "post": full | {"rope": "post"},
        "frame": full | {"rope": "frame", "prefill_segment": 1024},
        "bare": full | {"rope": "post", "num_landmark_tokens": 0, "hot_tokens": 0},
        "exact": {},
    }
    return {name: PageFormat(name, 1, DIM, **f) for name, f in fields.items()}


def scrambled(x):
    """SplitMix64's finaliser, uint64 in and out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sums(layer, start, digits):
    """Weighted sums uint64 `[T]` of the digits of the tokens `start ...`, cumulative."""
    weights = _WEIGHTS[layer, start : start + len(digits)]
    return (digits.astype(np.uint64) * weights).sum(-1, dtype=np.uint64).cumsum(dtype=np.uint64)


def digits_of(source, positions, view):
    """Digits `[T, 2 * DIGITS]` in 0 ... 15 from `source`, uint64 `[T]`, and the positions."""
    word = scrambled(source + scrambled(positions.astype(np.uint64) + np.uint64(view)))
    return (word[:, None] >> _SHIFTS & np.uint64(15)).astype(np.int64)


def candidates(read, position):
    """The likely and the second next token after `read`, the sum of layer 1 up to `position`."""
    word = int(scrambled(np.array([read + np.uint64(position)]))[0])
    likely, second = word % VOCAB, (word >> 20) % (VOCAB - 2)
    return likely, second + (second >= likely)  # distinct; `second` may be EOS only past `likely`


def logits_of(likely, second):
    row = torch.full((VOCAB,), NEVER)
    row[second] = SECOND
    row[likely] = LIKELY
    return row


@dataclass
class Script:
    """The tokens and digits of one sequence, computed from its prompt without a cache.

    Attributes:
        ids: the prompt, and the output as far as `speak` has extended it.
        digits: `[LAYERS, capacity, 2 * DIGITS]`, K and V of the tokens in `ids`.
    """

    format: PageFormat
    ids: list[int]
    params: object
    seed: int
    salt: str = ""
    pins: tuple[tuple[int, int], ...] = ()
    num_prompt: int = 0
    finish: str | None = None
    digits: np.ndarray = field(default=None, repr=False)

    def __post_init__(self):
        self.num_prompt = len(self.ids)
        self.visibility = Visibility.of(self.format)
        self.pinned = pinned_blocks(self.format, self.pins, self.num_prompt)
        room = min(LONGEST, self.num_prompt + self.params.max_tokens)
        self.digits = np.zeros((LAYERS, room, 2 * DIGITS), dtype=np.int64)
        self._read = np.zeros(LAYERS, dtype=np.uint64)
        self._stored = 0
        self._salt = int.from_bytes(f"{self.salt:>8.8}".encode(), "little")

    def shown(self, position):
        """Blocks that the query at `position` sees as pages."""
        visible = self.visibility.visible_blocks(position, self.num_prompt)
        return [b for b in range(visible) if b not in self.pinned]

    def view(self, position):
        """A number that identifies the salt and the blocks that a query sees as pages."""
        blocks = sum(1 << b for b in self.shown(position))
        return (self._salt * 31 + blocks * 0x9E3779B97F4A7C15) % (1 << 64)

    def store(self, end):
        """Extend `digits` to the first `end` tokens, a view at a time."""
        while self._stored < end:
            start = self._stored
            stop = min(end, self.visibility.chunk_end(start, self.num_prompt))
            where, view = np.arange(start, stop), self.view(start)
            found = np.array(self.ids[start:stop], dtype=np.uint64)
            for layer in range(LAYERS):
                digits = digits_of(found, where, view)
                found = self._read[layer] + sums(layer, start, digits)
                self.digits[layer, start:stop] = digits
                self._read[layer] = found[-1]
            self._stored = stop

    def speak(self, num_tokens):
        """Extend `ids` to `num_tokens`, or to where the sequence ends."""
        if self.params.max_tokens == 0:
            self.finish = "length"
        while len(self.ids) < num_tokens and self.finish is None:
            self.store(len(self.ids))
            likely, second = candidates(self._read[1], len(self.ids) - 1)
            made = len(self.ids) - self.num_prompt
            params = self.params
            logits = logits_of(likely, second)
            if made < params.min_tokens:
                logits[[*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]] = -np.inf
            if params.temperature:
                noise = uniform_noise(torch.tensor([self.seed]), torch.tensor([made]), VOCAB)[0]
                logits = logits / params.temperature - torch.log(-torch.log(noise))
            token = int(logits.argmax())
            self.ids.append(token)
            may_stop = made + 1 >= params.min_tokens
            stops = token in params.stop_token_ids or (token == EOS and not params.ignore_eos)
            if may_stop and stops:
                self.finish = "stop"
            elif made + 1 >= params.max_tokens or len(self.ids) >= LONGEST:
                self.finish = "length"

    @property
    def output(self):
        return self.ids[self.num_prompt :]


def scripts_of(format, request_id, prompt, params, salt, pins):
    """The scripts of a request's completions, by the names of their sequences in the cache."""
    return {
        f"{request_id}#{i}": Script(
            format, list(prompt), params, seed_of(params, f"0/{request_id}", i), salt, pins
        )
        for i in range(params.n)
    }


class DigitRunner:
    """The runner of an engine over the model of integers.

    Every step reads back all K and V of the sequences it runs, through the block tables.

    Attributes:
        scripts: the expected content of sequences, by name; all digits read are compared with it.
        stale: descriptions of values that were read but never stored there.
    """

    def __init__(self, cache):
        self.cache = cache
        self.scripts: dict[str, Script] = {}
        self.stale: list[str] = []
        self.num_values_read = 0
        self._pages: dict[tuple[int, bytes], np.ndarray] = {}

    def stats(self):
        return {}

    def forward(self, plan, token_ids, logit_rows, pending=None, visitor=None):
        ids = np.array(token_ids, dtype=np.uint64)
        if pending is not None:
            known = pending.ids.tolist()
            for place, row in enumerate(pending.sources):
                if row >= 0:
                    ids[place] = known[row]
        ends = np.cumsum([e.num_new for e in plan.entries])
        found = np.split(ids, ends[:-1])
        true = [self._num_true(plan, i, e, f) for i, (e, f) in enumerate(zip(plan.entries, found))]
        for layer in range(LAYERS):
            new = [
                digits_of(f, np.arange(e.start, e.start + e.num_new), self._script(e).view(e.start))
                for f, e in zip(found, plan.entries)
            ]
            flat = np.zeros((2, len(ids), 1, DIM), dtype=np.float32)
            flat[:, :, 0, :DIGITS] = np.concatenate(new).reshape(-1, 2, DIGITS).swapaxes(0, 1)
            k, v = torch.from_numpy(flat).to(self.cache.device)
            self.cache.append(layer, k, v)
            found = [
                sums(layer, 0, self._read(layer, e, n))[e.start :]
                for e, n in zip(plan.entries, true)
            ]
        flat = np.concatenate(found)
        positions = np.concatenate([np.arange(e.start, e.start + e.num_new) for e in plan.entries])

        def logits(rows):
            found = [logits_of(*candidates(flat[r], positions[r])) for r in rows]
            return torch.stack(found).to(self.cache.device)

        for start in range(0, 0 if visitor is None else len(visitor.rows), SLICE):
            visitor.visit(logits(visitor.rows[start : start + SLICE]))
        return logits(logit_rows)

    def _script(self, entry):
        return self.scripts[entry.seq_id]

    def _num_true(self, plan, place, entry, ids):
        """The tokens of a sequence, up to the first one of a draft that is not the script's."""
        end = entry.start + len(ids)
        if plan.drafted is None or not plan.drafted[place]:
            return end
        script = self._script(entry)
        script.speak(end)
        said = script.ids[entry.start : end]
        differ = [i for i, (a, b) in enumerate(zip(ids.tolist(), said)) if a != b]
        return entry.start + (differ[0] if differ else len(said))

    def _read(self, layer, entry, num_true):
        """Digits `[end, 2 * DIGITS]` of a sequence in a layer, from pages and exact pages.

        The first `num_true` of them are compared with the script.
        """
        place, group = next((i, g) for i, g in enumerate(self.cache.groups) if layer in g.layers)
        script, end = self._script(entry), entry.start + entry.num_new
        row, plane = slots_of(self.cache, entry.seq_id, place).row, group.plane(layer)
        found = np.empty((end, 2 * DIGITS))
        exact = np.ones(end, dtype=bool)
        for block in script.shown(entry.start) if group.seals else ():
            first = self.cache.format.num_landmark_tokens + block * BLOCK_TOKENS
            exact[first : first + BLOCK_TOKENS] = False
            position = group.page_table.device[row, block : block + 1]
            found[first : first + BLOCK_TOKENS] = self._page(plane, position, block)
        k, v = exact_gather(
            plane, group.exact_table.device[row], int(exact.sum()), 1, DIM, self.cache.dtype
        )
        found[exact] = digits_read(k, v)
        whole = np.nan_to_num(np.rint(found), nan=-1, posinf=-1, neginf=-1).astype(np.int64)
        self._compare(layer, entry, script, found[:num_true], whole[:num_true])
        return whole

    def _page(self, plane, position, block):
        """Digits of the page at unit `position`; pages with the same bytes are decoded once."""
        cache = self.cache
        start = int(position) * UNIT_BYTES
        raw = plane[start : start + cache.format.page_bytes].cpu().numpy().tobytes()
        found = self._pages.get((block, raw))
        if found is None:
            table = torch.full((block + 1,), -1, dtype=torch.int32, device=plane.device)
            table[block] = position[0]
            k, v = cache.ops.spectral_rebuild(
                plane,
                table,
                layout=cache.format.layout,
                rotation=cache.groups[0].rotation,
                basis=Basis(),
                dtype=cache.dtype,
                num_pages=1,
            )
            if len(self._pages) > 512:
                self._pages.clear()
            found = self._pages[block, raw] = digits_read(k, v)
        return found

    def _compare(self, layer, entry, script, found, whole):
        end = len(found)
        script.speak(end)
        script.store(end)
        self.num_values_read += whole.size
        good = (whole == script.digits[layer, :end]).all() and np.abs(found - whole).max() < 0.4
        if not good:
            bad = (np.abs(found - script.digits[layer, :end]) < 0.4).all(-1).argmin()
            self.stale.append(
                f"layer {layer} of {entry.seq_id} read {found[bad].tolist()} at position {bad} of "
                f"{end}; it stored {script.digits[layer, bad].tolist()}"
            )


def digits_read(k, v):
    """Digits `[T, 2 * DIGITS]`, not rounded, from K and V `[1, T, DIM]` as the cache reads them."""
    return torch.cat((k[0, :, :DIGITS], v[0, :, :DIGITS]), dim=-1).double().cpu().numpy()
