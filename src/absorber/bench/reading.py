"""Streams that are read once and then asked several times.

Shapes: B rows, T tokens, D hidden.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from absorber.backbone import Backbone, forward_states, read_on, with_sink

# Largest piece of a row given to the model at once, so that activations stay small.
_PIECE_TOKENS = 1024
_WIDE_BYTES = 4 * 2**30


class Reading:
    """What B rows of equal length have read, with whatever memory is attached.

    It is held in the model's cache; by a model that keeps none all of it is read again whenever something is added.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Begin with nothing read."""
        self._backbone = backbone
        self._cache: DynamicCache | None = DynamicCache(config=backbone.model.config)
        self._read_BT: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, backbone: Backbone, prefix_BT: Tensor, *, sink_id: int) -> "Reading":
        """Read a sink and what follows it."""
        reading, input_ids_BT = cls(backbone), with_sink(sink_id, prefix_BT)
        for piece_BT in torch.split(input_ids_BT, _PIECE_TOKENS, dim=1):
            reading.read(piece_BT)
        return reading

    def fork(self) -> "Reading":
        """Return an independent copy that goes on from here."""
        twin = copy.copy(self)
        twin._cache = copy.deepcopy(self._cache)
        return twin

    def widened(self, times: int) -> "Reading":
        """Return a copy in which every row stands so many times, one after another."""
        twin = self.fork()
        if twin._cache is not None:
            twin._cache.batch_repeat_interleave(times)
        if twin._read_BT is not None:
            twin._read_BT = twin._read_BT.repeat_interleave(times, dim=0)
        return twin

    @property
    def width(self) -> int:
        """How many times every row may stand in a copy that takes a few gigabytes at most; 1 is always allowed."""
        layers = [] if self._cache is None else self._cache.layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            return 1
        tensors = [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return max(1, _WIDE_BYTES // held) if held else 1

    @torch.no_grad()
    def read(self, ids_BT: Tensor) -> Tensor:
        """Read tokens after those read before.

        Returns:
            Their final hidden states [B, T, D].
        """
        ids_BT = ids_BT.to(self._backbone.device)
        self._read_BT = ids_BT if self._read_BT is None else torch.cat([self._read_BT, ids_BT], dim=1)
        if self._cache is not None:
            states_BTD, is_kept = read_on(self._backbone, ids_BT, self._cache)
            if is_kept:
                return states_BTD
            self._cache = None
        return forward_states(self._backbone, self._read_BT, first=self._read_BT.shape[1] - ids_BT.shape[1]).final_BTD

    def logits(self, states: Tensor) -> Tensor:
        """Logits of the tokens after these states, float32."""
        return self._backbone.logits(states).float()


class KeptReading(Reading):
    """What a method keeps of a text in a cache of its own, which no tokens can stand for."""

    width = 1

    last_BD: Tensor
    """Final states of the last token that was read: what the next one is predicted from."""

    def predict(self, passage_BP: Tensor) -> Tensor:
        """The final states [B, P, D] from which the tokens of a passage that follows are predicted."""
        return torch.cat([self.last_BD[:, None], self.fork().read(passage_BP)[:, :-1]], dim=1)


@torch.no_grad()
def continuation_nll(reading: Reading, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """Negative log-likelihood of one continuation per row, after a prompt; the reading stays as it was.

    Args:
        reading: Of as many rows.
        rows: Prompt and continuation of each; neither is empty.

    Returns:
        Sums over the tokens of the continuation, in nats.
    """
    log_p = predictions(reading, [(prompt, answer[:-1]) for prompt, answer in rows])
    return [-_sum_of(log_p_TV, answer) for log_p_TV, (_, answer) in zip(log_p, rows, strict=True)]


@torch.no_grad()
def choice_nll(
    reading: Reading, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Negative log-likelihoods of the same continuations after every row's prompt; the reading stays as it was.

    Continuations that agree in all tokens but the last, as those of one token do, share one pass.

    Args:
        reading: Of as many rows.
        prompts: One per row; none is empty.
        choices: Continuations; none is empty.

    Returns:
        For each row the sums over the tokens of each choice, in nats.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(tuple(choice[:-1]), []).append(index)
    found = [[0.0] * len(choices) for _ in prompts]
    for begin, indices in groups.items():
        for row, log_p_TV in enumerate(predictions(reading, [(prompt, begin) for prompt in prompts])):
            for index in indices:
                found[row][index] = -_sum_of(log_p_TV, choices[index])
    return found


@torch.no_grad()
def predictions(reading: Reading, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Log-probabilities [T + 1, V] of the tokens that follow each row's prompt, and those of the T tokens behind it.

    Args:
        reading: Of as many rows; it stays as it was.
        rows: For each the prompt, not empty, and what stands behind it.
    """
    longest = max(len(prompt) + len(behind) for prompt, behind in rows)
    # What stands after a row's end is not seen from it, so that any token may fill it up.
    padded = [[*prompt, *behind, *[0] * (longest - len(prompt) - len(behind))] for prompt, behind in rows]
    states_BTD = reading.fork().read(torch.tensor(padded))
    return [
        reading.logits(states_TD[len(prompt) - 1 : len(prompt) + len(behind)]).log_softmax(dim=-1)
        for states_TD, (prompt, behind) in zip(states_BTD, rows, strict=True)
    ]


def _sum_of(log_p_TV: Tensor, token_ids: Sequence[int]) -> float:
    ids_T = torch.tensor(token_ids, device=log_p_TV.device)
    return float(log_p_TV.gather(1, ids_T[:, None]).sum())


@torch.no_grad()
def write_greedily(
    reading: Reading,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    is_done: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Let each row go on after its prompt with the likeliest tokens; the reading stays as it was.

    All rows advance together, one token at a time: a row whose prompt is longer is still being given it while others
    write already. So no row holds padding, and each writes what it would write alone.

    Args:
        reading: Of as many rows.
        prompts: One per row; none is empty.
        max_new_tokens: At most so many are written.
        is_done: Whether a row that has written these tokens has to go on no more.

    Returns:
        What each row wrote.
    """
    ahead, length = reading.fork(), min(map(len, prompts))
    written: list[list[int]] = [[] for _ in prompts]
    writing = set(range(len(prompts)))
    given = [list(prompt[:length]) for prompt in prompts]
    while writing:
        states_BTD = ahead.read(torch.tensor(given))
        likeliest_B = reading.logits(states_BTD[:, -1]).argmax(dim=-1).tolist()
        given = []
        for row, (prompt, likeliest) in enumerate(zip(prompts, likeliest_B, strict=True)):
            if length < len(prompt):
                given.append([prompt[length]])
                continue
            given.append([likeliest])
            if row in writing:
                written[row].append(likeliest)
                if len(written[row]) == max_new_tokens or is_done(written[row]):
                    writing.remove(row)
        length += 1
    return written
