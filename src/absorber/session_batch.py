"""Many sessions on one model: rounds that are due at the same time are absorbed in one batch.

A GPU is far from busy with one stream of a small model. Sessions differ in length and age, come and go; each absorbs
what it would absorb alone.
"""

from collections.abc import Hashable, Sequence

import torch

from absorber.adapter import Adapter
from absorber.errors import ConfigError, ContextError
from absorber.session import Session
from absorber.stream import Stream, absorb_together
from absorber.text import cut


class SessionBatch:
    """Sessions that read together.

        batch = absorber.SessionBatch(sessions)
        batch.append(["a text for the first", "one for the second", ""])

    The sessions are the caller's: ask them, save them, and leave them out of the next batch, as you like.
    """

    def __init__(self, sessions: Sequence[Session], *, at_most: int | None = None) -> None:
        """Take sessions on one model.

        Args:
            sessions: Of any length and age. Those with the same settings share rounds; with `study`, or with an
                optimizer that is carried on, each has its own.
            at_most: Largest number of streams absorbed at once, so that they fit the device; all by default.

        Raises:
            ConfigError: If they are on different models, or one comes twice, or `at_most` is below one.
        """
        if len({id(session.model) for session in sessions}) > 1:
            raise ConfigError("sessions of one batch share a model; these have several. Make a batch for each")
        if len({id(session) for session in sessions}) < len(sessions):
            raise ConfigError("a session is in the batch twice; give each of them once")
        if at_most is not None and at_most < 1:
            raise ConfigError(f"at_most is 1 or more; got {at_most}")
        self.sessions = list(sessions)
        self._at_most = at_most
        # Kept from round to round, for the steps that were recorded of it.
        self._joined: tuple[Hashable, int, Adapter] | None = None

    def append(self, texts: Sequence[str]) -> list[int]:
        """Read a text at the end of each session, absorbing what leaves the windows.

        Args:
            texts: One for each session, which may be empty.

        Returns:
            How many tokens each had.

        Raises:
            ContextError: If there is not one for each session.
            AbsorptionError: If a round cannot be carried out. Nothing is lost: texts stay in the windows or pending,
                and the next call, also with empty texts, goes on.
        """
        self._check(texts)
        token_ids = [
            [token for piece in cut([text]) for token in session.tokenize(piece)]
            for session, text in zip(self.sessions, texts, strict=True)
        ]
        self.append_ids(token_ids)
        return [len(own) for own in token_ids]

    def append_ids(self, token_ids: Sequence[Sequence[int]]) -> None:
        """Read token ids at the end of each session; see `append`."""
        self._check(token_ids)
        streams = [session.stream for session in self.sessions]
        for stream, own in zip(streams, token_ids, strict=True):
            stream.give(torch.tensor([list(own)], dtype=torch.long))
        while due := [stream for stream in streams if stream.fill()]:
            groups: dict[Hashable, list[Stream]] = {}
            for stream in due:
                groups.setdefault(stream.kind, []).append(stream)
            for kind, group in groups.items():
                self._absorb(kind, group)

    def _absorb(self, kind: Hashable, group: list[Stream]) -> None:
        size = 1 if kind is None else self._at_most or len(group)
        for some in (group[first : first + size] for first in range(0, len(group), size)):
            if len(some) == 1:
                some[0].absorb()
                continue
            if self._joined is None or self._joined[:2] != (kind, len(some)):
                self._joined = None  # before another one is made
                self._joined = kind, len(some), Adapter.joined([stream.adapter for stream in some])
            absorb_together(some, self._joined[2])

    def _check(self, given: Sequence[object]) -> None:
        if len(given) != len(self.sessions):
            raise ContextError(f"there are {len(self.sessions)} sessions; got {len(given)} texts. Give one for each")
