"""A session: a stream with its window, its memory and its place in the sources, which can be asked, saved, resumed."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch

from absorber import saved_session
from absorber.backbone import eos_tokens, inspect, sink_token
from absorber.config import AbsorbConfig, StreamConfig
from absorber.decoding import StaticDecoder, Way, new_decoder
from absorber.errors import ContextError, MemoryFileError
from absorber.gate import Rule, helps
from absorber.generation import Decoder
from absorber.graphs import forget
from absorber.memory import Memory, Round
from absorber.notes import make_guide
from absorber.progress import OnProgress, Progress
from absorber.saved_session import SavedSession
from absorber.stream import Stream, Work
from absorber.text import as_turn, cut
from absorber.writing import as_it_comes, write_next, write_to_end


class Session:
    """An endless text for a model with a finite window. Algorithm 2, arXiv 2604.20915.

    What is in the window is read verbatim; what left it is in the memory. The model is changed only while a method
    of the session runs, and is bit for bit what it was whenever control is with the caller.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: AbsorbConfig | None = None,
        stream: StreamConfig | None = None,
        *,
        memory: Memory | None = None,
        progress: OnProgress | None = None,
        merged: bool = False,
    ) -> None:
        """Begin with an empty window.

        Args:
            model: A Hugging Face causal language model.
            tokenizer: Its tokenizer.
            config: How a context is absorbed; that of the memory, if one is given, or the default.
            stream: Window sizes and generation; that of the memory, if one is given, or the default.
            memory: A memory to go on from; it is changed in place.
            progress: Called before each step and after each round.
            merged: Speak with weights that hold base and memory, where the model allows it (docs/performance.md):
                tokens come sooner, and the projections are in memory twice.

        Raises:
            ModelError: If the model cannot be used.
            ConfigError: If the window is larger than the model's positions, or a setting does not fit the model.
            MemoryMismatchError: If the memory is of another model.
        """
        config = config or (memory.config if memory else AbsorbConfig())
        stream = stream or (memory.stream if memory else StreamConfig())
        self.model, self.tokenizer = model, tokenizer
        self._backbone = inspect(model)
        if memory is None:
            sink_id = sink_token(model, tokenizer)
            memory = Memory.fresh(model, sink_id=sink_id, config=config, stream=stream)
        else:
            memory.check(model)
            memory.go_on_with(config, stream)
        self.memory = memory
        self._progress = progress
        self._eos_ids = eos_tokens(model, tokenizer)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._sources: dict[str, int] = {}
        way: Way = "merged" if merged else "beside"
        room = 1 + stream.window_tokens + stream.max_new_tokens
        self._decoder = new_decoder(
            self._backbone, read_tokens=stream.read_tokens, capacity=room, adapter=memory.adapter, way=way
        )
        self._bare = new_decoder(self._backbone, read_tokens=stream.read_tokens, capacity=room)
        self._stream = Stream(
            self._backbone,
            memory.adapter,
            config,
            stream,
            sink_id=memory.sink_id,
            guide=None if config.study == "off" else make_guide(tokenizer, model),
            on_step=None if progress is None else self._on_step,
            on_round=self._on_round,
            on_work=None if progress is None else self._report,
        )
        self._stream.num_rounds = memory.num_rounds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoder.release()
        self._bare.release()
        forget(self.memory.adapter)

    # --- State

    @property
    def window_ids(self) -> list[int]:
        """Z: the token ids that the model reads verbatim."""
        return self._stream.window_BT[0].tolist()

    @property
    def stream(self) -> Stream:
        """The window, and what its rounds need; for those who absorb several sessions together."""
        return self._stream

    @property
    def num_tokens(self) -> int:
        """Tokens absorbed so far and in the window."""
        return self.memory.num_tokens + self._stream.window_BT.shape[1]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return self._decoder.cache_bytes + self._bare.cache_bytes

    def source_tokens(self, name: str) -> int:
        """How many tokens of a named source were read (see `read`)."""
        return self._sources.get(name, 0)

    # --- Reading

    def append(self, text: str) -> int:
        """Read text at the end of the stream, absorbing what leaves the window.

        Args:
            text: Any amount; parts of one text are best cut at ends of lines, for each is tokenized by itself.

        Returns:
            How many tokens it had.

        Raises:
            AbsorptionError: If a round cannot be carried out. Nothing is lost: the text stays in the window or
                pending, and the next call goes on.
        """
        # All of it before the first round: what an interruption leaves must be pending, not lost.
        token_ids = [token for piece in cut([text]) for token in self.tokenize(piece)]
        self.append_ids(token_ids)
        return len(token_ids)

    def append_ids(self, token_ids: Sequence[int]) -> None:
        """Read token ids at the end of the stream; see `append`."""
        self._stream.append(torch.tensor([list(token_ids)], dtype=torch.long))

    def read_window(self) -> None:
        """Fill the cache with the window now, so that the next answer begins at once."""
        self._at_window()

    def read(self, name: str, parts: Iterable[str]) -> int:
        """Read a source from where this session stopped in it; a source read to its end adds nothing.

        Args:
            name: What the session calls the source, for instance its path.
            parts: Its text from the beginning, in parts of any size, cut in the same or another way as before.

        Returns:
            How many tokens were new.

        Raises:
            AbsorptionError: As `append`.
        """
        self.append_ids([])  # what an interruption left pending
        seen = read = 0
        for piece in cut(parts):
            token_ids = self.tokenize(piece)
            known = self._sources.get(name, 0)
            fresh = token_ids[max(0, known - seen) :]
            seen += len(token_ids)
            if fresh:
                # Counted first: from here on the tokens are the stream's, pending at worst.
                self._sources[name] = seen
                read += len(fresh)
                self.append_ids(fresh)
        return read

    def flush(self, *, always: bool = False) -> None:
        """End the input: absorb what is left if `StreamConfig.flush` is "generate" or always, else keep it."""
        if always or self.memory.stream.flush == "generate":
            self._stream.flush(eos_ids=self._eos_ids, generator=self._generator)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # --- Answering

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        gate: Rule | None = None,
    ) -> str:
        """Answer from memory and window; the session stays as it is, question and answer forgotten.

        Args:
            question: Any text; models with a chat template get it as a user's turn.
            max_new_tokens: These three are as in `StreamConfig`, which has their defaults.
            temperature: Same.
            top_p: Same.
            seed: Of the sampling; that of the session, as far as it has come, if left out.
            gate: As in `StreamConfig`, which has its default.

        Raises:
            ContextError: If the question is empty, or too long for the model with the window.
        """
        if not question.strip():
            raise ContextError("the question is empty; give one")
        settings = self._sampling(max_new_tokens, temperature, top_p)
        generator = self._generator.clone_state() if seed is None else torch.Generator().manual_seed(seed)
        turn = self.tokenize(as_turn(self.tokenizer, question))
        with_memory = self._memory_helps(turn, gate or self.memory.stream.gate)
        decoder = self._at_window(with_memory=with_memory)
        with decoder.aside():
            decoder.read(turn)
            written = write_to_end(decoder, settings, generator, eos_ids=self._eos_ids)
        return str(self.tokenizer.decode(written, skip_special_tokens=True)).strip()

    def generate(
        self,
        prompt: str | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        raw: bool = False,
    ) -> Iterator[str]:
        """Continue the stream; what is written becomes part of it and is absorbed in its turn (Algorithm 2).

        Args:
            prompt: Read first; models with a chat template get it as a user's turn.
            max_new_tokens: These three are as in `StreamConfig`, which has their defaults.
            temperature: Same.
            top_p: Same.
            raw: Read the prompt as it is, without chat template.

        Yields:
            Text as it is written, until an end-of-sequence token.

        Raises:
            ContextError: If there is nothing to continue.
            AbsorptionError: If a round cannot be carried out.
        """
        settings = self._sampling(max_new_tokens, temperature, top_p)
        turn = "" if prompt is None else prompt if raw else as_turn(self.tokenizer, prompt)
        self.append_ids(self.tokenize(turn))  # after what an interruption left pending
        yield from as_it_comes(self.tokenizer, self._continue(settings))

    def _continue(self, settings: StreamConfig) -> Iterator[int]:
        """Tokens that follow the window, each appended before it is told; an end-of-sequence token is not told."""
        count = 0
        while count < settings.max_new_tokens:
            room = self.memory.stream.window_tokens - self._stream.window_BT.shape[1]  # then a round follows
            at_most = min(settings.max_new_tokens - count, room, count or 1)
            for token in write_next(self._at_window(), settings, self._generator, at_most=at_most):
                self.append_ids([token])
                if token in self._eos_ids:
                    return
                count += 1
                place = self.num_tokens
                yield token
                if self.num_tokens != place:
                    break  # the caller appended something; what was written ahead does not follow it

    def _sampling(self, max_new_tokens: int | None, temperature: float | None, top_p: float | None) -> StreamConfig:
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        return self.memory.stream.replace(**{key: value for key, value in given.items() if value is not None})

    def _prefix(self) -> list[int]:
        """Sink and window."""
        return ([self.memory.sink_id] if self.memory.config.sink == "shared" else []) + self.window_ids

    def _at_window(self, *, with_memory: bool = True) -> Decoder | StaticDecoder:
        """The decoder that speaks with the memory, or that without, having read the sink and the whole window."""
        decoder = self._decoder if with_memory else self._bare
        decoder.read_all(self._prefix())
        return decoder

    def _memory_helps(self, question_ids: list[int], rule: Rule) -> bool:
        """Whether the question is to be answered with the memory."""
        prefix = self._prefix() or [self.memory.sink_id]  # the first token needs something that predicts it
        return helps(self._backbone, self.memory.adapter, prefix, question_ids, rule)

    # --- Progress

    def _on_step(self, step: int, loss_B: torch.Tensor) -> None:
        self._report("synchronizing", step, self.memory.config.max_steps, loss=float(loss_B[0]))

    def _on_round(self, rounds: list[Round]) -> None:
        self.memory.note(rounds[0])
        self._decoder.reset()  # other weights, another window
        done = rounds[0]
        self._report("synchronizing", done.num_steps, self.memory.config.max_steps, loss=done.loss_after, finished=done)

    def _report(
        self,
        work: Work | Literal["synchronizing"],
        step: int,
        max_steps: int,
        *,
        loss: float = math.nan,
        finished: Round | None = None,
    ) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    num_tokens=self.num_tokens,
                    num_rounds=self.memory.num_rounds,
                    work=work,
                    step=step,
                    max_steps=max_steps,
                    loss=loss,
                    finished=finished,
                )
            )

    # --- On disk

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write window, memory and state into a folder, whole or not at all; `resume` goes on from it.

        The folder `memory` in it is a PEFT folder like that of `Memory.save`.

        Raises:
            MemoryFileError: If something that is not a session stands there, or it cannot be written.
        """
        saved = SavedSession.of(
            self._stream, self.memory, sources=self._sources, random_state=self._generator.get_state()
        )
        saved_session.write(folder, saved)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        model: Any,
        tokenizer: Any,
        *,
        progress: OnProgress | None = None,
        merged: bool = False,
    ) -> "Session":
        """Go on from a folder that `save` wrote; progress and merged are as in a new session.

        Raises:
            SessionNotFoundError: If there is no session.
            MemoryFileError: If it is damaged.
            MemoryMismatchError: If it is of another model.
        """
        saved = saved_session.read(folder, model)
        session = cls(model, tokenizer, memory=saved.memory, progress=progress, merged=merged)
        try:
            saved.put_back(session._stream)
            session._generator.set_state(saved.random_state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise MemoryFileError(f"{folder} is damaged: {error}. Restore a copy, or start anew") from error
        session._sources = saved.sources
        return session
