"""Callers of one engine that wait at once: each step serves the requests of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

from spectral_paged.engine.engine import Engine
from spectral_paged.engine.turns import Turns
from spectral_paged.errors import SpectralPagedError, attach_outputs
from spectral_paged.outputs import RequestOutput

Piece = TypeVar("Piece")


@dataclass(slots=True, eq=False)
class Inbox:
    """A caller's requests, and the latest output of each until the caller takes it.

    Attributes:
        places: index of each request's prompt in the caller's list.
        running: requests that have not finished.
    """

    places: dict[str, int]
    running: set[str]
    latest: dict[str, RequestOutput] = field(default_factory=dict)


class Callers:
    """Lets callers, of one thread or several, queue requests and wait for their outputs.

    Args:
        engine: returns the engine, whose steps serve all callers; raises once there is none.
        turns: held while a step runs, and while requests are queued.
    """

    def __init__(self, engine: Callable[[], Engine], turns: Turns) -> None:
        self._engine, self._turns = engine, turns
        self._inboxes: list[Inbox] = []

    def queue(
        self,
        requests: Sequence[Callable[[], str]],
        errors: list[SpectralPagedError] | None,
    ) -> Inbox:
        """Queue requests and open an inbox for them, before anybody's next step.

        Args:
            requests: each queues one request of the caller's list and returns its id.
            errors: refusals are appended to it. If it is None, a refusal aborts all and is raised.
        """
        with self._turns:
            places = self._queue_all(requests, errors)
            inbox = Inbox(places, set(places))
            self._inboxes.append(inbox)
            return inbox

    def _queue_all(
        self,
        requests: Sequence[Callable[[], str]],
        errors: list[SpectralPagedError] | None,
    ) -> dict[str, int]:
        places: dict[str, int] = {}
        try:
            for i, submit in enumerate(requests):
                try:
                    places[submit()] = i
                except SpectralPagedError as error:
                    error.request_id = error.request_id or f"prompt {i}"
                    if errors is None:
                        raise
                    errors.append(error)
        except BaseException:
            for request_id in places:
                self._engine().abort(request_id)
            raise
        return places

    def join(self, inboxes: Sequence[Inbox]) -> Inbox:
        """Return one inbox for the requests of several, whose places follow each other."""
        with self._turns:
            joined = Inbox({}, set())
            for inbox in inboxes:
                self._inboxes.remove(inbox)
                joined.places |= {name: len(joined.places) + i for name, i in inbox.places.items()}
                joined.running |= inbox.running
                joined.latest |= inbox.latest
            self._inboxes.append(joined)
            return joined

    def pieces(
        self, inbox: Inbox, pieces_of: Callable[[RequestOutput], Iterable[Piece]]
    ) -> Iterator[Piece]:
        """Run steps until the requests have finished and yield what is made of their outputs.

        Callers may alternate (two streams at once, or two threads). A step serves all of them, and
        another caller's outputs wait in its inbox. Closing the iterator aborts running requests.

        Args:
            pieces_of: called between steps, so the engine stands where the output was made.
        """
        try:
            while inbox.running:
                with self._turns:
                    pieces = list(self._next_pieces(inbox, pieces_of))
                yield from pieces
        finally:
            with self._turns:
                self._inboxes.remove(inbox)
                for request_id in inbox.running:
                    self._engine().abort(request_id)

    def outputs(
        self,
        inbox: Inbox,
        num_prompts: int,
        errors: list[SpectralPagedError],
        *,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Run steps until all requests of an inbox have ended; return outputs in prompt order.

        Args:
            errors: those of prompts that were refused.

        Raises:
            SpectralPagedError: the first of `errors`, or of a request, after all have ended.
        """
        results: list[RequestOutput | None] = [None] * num_prompts
        bar = tqdm(total=len(inbox.places), desc="generate", unit="prompt", disable=not use_tqdm)
        try:
            for output in self.pieces(inbox, lambda output: [output]):
                if output.finished:
                    results[inbox.places[output.request_id]] = output
                    bar.update()
                    if output.error is not None:
                        errors.append(output.error)
        except BaseException as error:
            attach_outputs(error, results, "generate ended early")
            raise
        finally:
            bar.close()
        if errors:
            first, counts = errors[0], f"{len(errors)} of {num_prompts} requests failed"
            attach_outputs(first, results, f"{first.request_id}; {counts}")
            raise first
        return [r for r in results if r is not None]

    def _next_pieces(
        self, inbox: Inbox, pieces_of: Callable[[RequestOutput], Iterable[Piece]]
    ) -> Iterator[Piece]:
        """Yield what the caller's outputs give; a step is run first where there are none."""
        if not inbox.latest:
            self._step()
        for request_id, output in inbox.latest.items():
            if output.finished:
                inbox.running.discard(request_id)
            yield from pieces_of(output)
        inbox.latest.clear()

    def _step(self) -> None:
        """Run a step and put its outputs into the callers' inboxes."""
        for output in self._engine().step():
            for other in self._inboxes:
                if output.request_id in other.running:
                    other.latest[output.request_id] = output

    def finish(self) -> None:
        """Run steps until no request is left; outputs wait in their inboxes."""
        with self._turns:
            while self._engine().has_unfinished():
                self._step()
