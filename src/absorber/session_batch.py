"""Many sessions on one model: rounds that are due at the same time are absorbed in one batch.

A GPU is far from busy with one stream of a small model. Sessions differ in length and age, come and go; each absorbs
what it would absorb alone.
"""

from collections.abc import Hashable, Sequence

import torch

from absorber.adapter import Adapter
from absorber.errors import ConfigError, ContextError, DivergedError
from absorber.session import Session
from absorber.stream import Stream, absorb_together
from absorber.text import cut

_MOST_JOINED = 4


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
        self._joined: dict[Hashable, Adapter] = {}

    def append(self, texts: Sequence[str]) -> list[int]:
        """Read a text at the end of each session, absorbing what leaves the windows.

        Args:
            texts: One for each session, which may be empty.

        Returns:
            How many tokens each had.

        Raises:
            ContextError: If there is not one for each session.
            AbsorptionError: If a round cannot be carried out. Nothing is lost: texts stay in the windows or pending,
                and the next call, also with empty texts, goes on. A session whose text or memory is at fault does not
                keep the others from their rounds.
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
        failed: dict[int, DivergedError] = {}
        while due := [stream for stream in streams if id(stream) not in failed and stream.fill()]:
            groups: dict[Hashable, list[Stream]] = {}
            for stream in due:
                groups.setdefault(stream.kind, []).append(stream)
            for kind, group in groups.items():
                size = 1 if kind is None else self._at_most or len(group)
                for first in range(0, len(group), size):
                    failed |= self._absorb(kind, group[first : first + size])
        if failed:  # when all others are done
            raise next(iter(failed.values()))

    def _absorb(self, kind: Hashable, streams: list[Stream]) -> dict[int, DivergedError]:
        """One round of each; return those that cannot be absorbed, with what is wrong with them."""
        try:
            if len(streams) == 1:
                streams[0].absorb()
            else:
                absorb_together(streams, self._joined_for(kind, streams))
        except DivergedError as error:
            if len(streams) == 1:
                return {id(streams[0]): error}
            return {place: error for stream in streams for place, error in self._absorb(kind, [stream]).items()}
        return {}

    def _joined_for(self, kind: Hashable, streams: list[Stream]) -> Adapter:
        """Weights for so many streams, kept from round to round for the steps that were recorded of them."""
        key = kind, len(streams)
        if key not in self._joined:
            while len(self._joined) >= _MOST_JOINED:
                del self._joined[next(iter(self._joined))]
            self._joined[key] = Adapter.joined([stream.adapter for stream in streams])
        return self._joined[key]

    def _check(self, given: Sequence[object]) -> None:
        if len(given) != len(self.sessions):
            raise ContextError(f"there are {len(self.sessions)} sessions; got {len(given)} texts. Give one for each")
