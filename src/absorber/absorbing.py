"""`absorb`: a session that reads one text and keeps the memory alone."""

from collections.abc import Iterable
from typing import Any

from absorber.config import AbsorbConfig, StreamConfig
from absorber.errors import ContextError, DivergedError
from absorber.memory import Memory
from absorber.progress import OnProgress
from absorber.session import Session


def absorb(
    model: Any,
    tokenizer: Any,
    text: str | Iterable[str],
    config: AbsorbConfig | None = None,
    stream: StreamConfig | None = None,
    *,
    memory: Memory | None = None,
    progress: OnProgress | None = None,
) -> Memory:
    """Absorb a text of any length into a memory of constant size.

    Args:
        model: A Hugging Face causal language model; untouched.
        tokenizer: Its tokenizer.
        text: The text, or its parts, cut at ends of lines.
        config: How a context is absorbed; the default if left out.
        stream: How the text is cut; the default if left out. Its `flush` is "generate" unless it says "keep",
            which leaves the last tokens, at most n + m - 1, out of the memory.
        memory: A memory to go on from; it is changed in place and returned.
        progress: Called before each step and after each round.

    Returns:
        The memory; its ledger says what every round did.

    Raises:
        ContextError: If the text is empty, or with `flush="keep"` shorter than a window.
        DivergedError: If every round was rolled back.
        AbsorptionError: If a round cannot be carried out.
    """
    with Session(model, tokenizer, config, stream, memory=memory, progress=progress) as session:
        before = session.memory.num_rounds, session.memory.num_rolled_back
        num_tokens = session.read("text", [text] if isinstance(text, str) else text)
        if not num_tokens:
            raise ContextError("the text is empty, so there is nothing to absorb; give some text")
        if session.memory.stream.flush != "keep":
            session.flush(always=True)
        finish(session.memory, since=before, num_tokens=num_tokens)
        return session.memory


def finish(memory: Memory, *, since: tuple[int, int], num_tokens: int) -> None:
    """Refuse a memory that absorbed nothing of what was read."""
    rounds, rolled_back = memory.num_rounds - since[0], memory.num_rolled_back - since[1]
    if rounds == 0:
        window = memory.stream.window_tokens
        raise ContextError(
            f"the text has {num_tokens} tokens and the window {window}, so nothing left it to be absorbed; give more "
            'text, make context_tokens or sync_tokens smaller, or use flush = "generate"'
        )
    if rounds == rolled_back:
        raise DivergedError(
            f"all {rounds} rounds were rolled back because their loss rose or was not finite, so nothing was absorbed; "
            "use a smaller learning_rate"
        )
