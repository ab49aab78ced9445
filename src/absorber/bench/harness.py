"""Absorber as a model of lm-evaluation-harness: what the window holds is read as `hf` does, longer contexts absorbed.

    absorber eval --tasks TASK --model_args pretrained=MODEL,window=1536,memory=FOLDER

Each context begins with the memory given, or with none, and leaves nothing behind. Of a long text the next tokens are
scored, n at a time, given the window and the memory before them (`loglikelihood_rolling`). This module is imported when
the harness is, and never by the rest of Absorber.
"""

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from absorber.adapter import Adapter
from absorber.backbone import forward_states, inspect, sink_token, untouched
from absorber.config import Preset, preset, read_toml
from absorber.errors import ConfigError
from absorber.lessons import Anchors
from absorber.memory import Memory
from absorber.models import load
from absorber.notes import make_guide
from absorber.stream import Stream

Scored = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would have written it."""
_SMALLEST_WINDOW = 3


@register_model("absorber")
class AbsorberLM(HFLM):
    """A causal language model with a window and a memory."""

    def __init__(
        self,
        pretrained: Any = None,
        *,
        tokenizer: Any = None,
        memory: str | None = None,
        window: int | None = None,
        config: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str = "none",
        **more: Any,
    ) -> None:
        """Load model and memory.

        Args:
            pretrained: What `absorber.load` takes, or a model with its tokenizer; the model of the memory, or the
                default, if left out.
            tokenizer: Of a model that is given.
            memory: Folder of a saved memory, which every context begins with.
            window: n + m, of which a third is absorbed at once; that of the memory or 1536 if left out.
            config: TOML file with tables [absorb] and [stream].
            device: auto, cpu, cuda, cuda:1, mps.
            dtype: auto, float32, bfloat16, float16.
            quantization: none, 8bit or 4bit.
            more: What `hf` takes for a model that is loaded: batch_size, max_length, add_bos_token, ...

        Raises:
            AbsorberError: If model, memory or settings cannot be used.
        """
        if pretrained is None and memory is not None:
            pretrained = Memory.provenance(memory)["base"]
        if pretrained is None or isinstance(pretrained, str):
            pretrained, tokenizer = load(pretrained, device=device, dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
        super().__init__(pretrained, tokenizer=tokenizer, **more)
        self._backbone = inspect(pretrained)
        saved = None if memory is None else Memory.load(memory, pretrained)
        self._settings = _settings(saved, config, window)
        self._has_memory = saved is not None
        self._sink_id = saved.sink_id if saved else sink_token(pretrained, tokenizer)
        self._rounds_before = saved.num_rounds if saved else 0
        self._adapter = saved.adapter if saved else Adapter.fresh(self._backbone, self._settings.absorb)
        self._first = self._adapter.snapshot()
        self._guide = None if self._settings.absorb.study == "off" else make_guide(tokenizer, pretrained)
        self._anchors: Anchors | None = None
        self._absorbed = False
        self.num_absorbed = 0
        """Rounds of all contexts so far."""
        self.longest = 0
        """Tokens of the longest text so far, with what is asked of it."""
        self._memory_name = "none" if memory is None else _name_of(Path(memory))
        self._begin()

    @property
    def settings(self) -> dict[str, Any]:
        """What tells two such models with the same base apart, for records; a memory by name and content."""
        return {"memory": self._memory_name} | self._settings.stream.to_dict() | self._settings.absorb.to_dict()

    @property
    def rounds_before(self) -> int:
        """Rounds that made the memory given."""
        return self._rounds_before

    # --- What fits: as `hf` reads it, with the memory

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """The model as it is after what was read."""
        attached = self._adapter.attached(self._backbone) if self._absorbed or self._has_memory else None
        with untouched(self._backbone.model), attached or contextlib.nullcontext():
            yield

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with self._speaking():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._speaking():
            return super()._model_generate(*args, **kwargs)

    def _fits(self, num_tokens: int, *, num_new: int = 0) -> bool:
        return num_tokens <= self._settings.stream.window_tokens and num_tokens + num_new <= self.max_length

    def _bare(self, token_ids: Sequence[int]) -> list[int]:
        """Without the token that begins a text: the sink takes its place."""
        begins = {self.prefix_token_id, self.tokenizer.bos_token_id, self._sink_id}
        return list(token_ids[1:] if token_ids and token_ids[0] in begins else token_ids)

    # --- What does not: absorbed

    def _begin(self) -> Stream:
        """A stream that has read nothing, and the memory as it was given."""
        self._adapter.restore(self._first)
        self._absorbed = False
        stream = Stream(
            self._backbone,
            self._adapter,
            self._settings.absorb,
            self._settings.stream,
            sink_id=self._sink_id,
            guide=self._guide,
        )
        stream.num_rounds = self._rounds_before
        stream.anchors = self._anchors  # what the base writes from nothing, and says of it, is the same every time
        return stream

    @torch.enable_grad()
    def _read(self, stream: Stream, token_ids: Sequence[int]) -> None:
        before = stream.num_rounds
        stream.append(torch.tensor([list(token_ids)], dtype=torch.long))
        self._anchors = stream.anchors
        self.num_absorbed += stream.num_rounds - before
        self._absorbed = stream.num_rounds > self._rounds_before

    def _prefix(self, stream: Stream) -> list[int]:
        return [self._sink_id, *stream.window_BT[0].tolist()]

    @torch.no_grad()
    def _score(self, stream: Stream, token_ids: Sequence[int]) -> tuple[Scored, bool]:
        """Score what follows, n tokens at a time, each part read before the next.

        Returns:
            The score, and whether the stream is still where it was.
        """
        total, is_greedy, rest = 0.0, True, list(token_ids)
        while True:
            prefix = self._prefix(stream)
            size = min(self._settings.stream.context_tokens, max(1, self.max_length - len(prefix)))
            part, rest = rest[:size], rest[size:]
            ids_1T = torch.tensor([prefix + part], device=self.device)
            with self._speaking():
                states = forward_states(self._backbone, ids_1T, first=len(prefix) - 1)
                log_p_TV = self._backbone.logits(states.final_BTD[0, :-1]).float().log_softmax(dim=-1)
            part_T = ids_1T[0, len(prefix) :]
            total += float(log_p_TV.gather(1, part_T[:, None]).sum())
            is_greedy = is_greedy and bool((log_p_TV.argmax(dim=-1) == part_T).all())
            if not rest:
                return (total, is_greedy), size >= len(token_ids)
            self._read(stream, part)

    # --- The harness's three questions

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[Scored]:
        """How likely each continuation is after its context; contexts that come again are absorbed once."""
        found: dict[int, Scored] = {}
        long: dict[tuple[int, ...], list[int]] = defaultdict(list)
        short = []
        for place, (_, context, continuation) in enumerate(requests):
            bare = self._bare(context)
            self.longest = max(self.longest, len(bare) + len(continuation))
            if self._fits(len(bare) + len(continuation)):
                short.append(place)
            else:
                long[tuple(bare)].append(place)
        self._begin()
        if short:
            known = super()._loglikelihood_tokens([requests[place] for place in short], disable_tqdm, **more)
            found.update(zip(short, known, strict=True))
        for bare_ids, places in long.items():
            stream: Stream | None = None
            for place in places:
                if stream is None:
                    stream = self._begin()
                    self._read(stream, bare_ids)
                found[place], stays = self._score(stream, requests[place][2])
                stream = stream if stays else None
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
        self._begin()
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """How likely each text is, from its beginning to its end."""
        found: dict[int, float] = {}
        texts = [self._bare(self.tok_encode(request.args[0])) for request in requests]
        self.longest = max([self.longest, *map(len, texts)])
        short = [place for place, token_ids in enumerate(texts) if self._fits(len(token_ids))]
        if short:
            known = super().loglikelihood_rolling([requests[place] for place in short], disable_tqdm)
            found.update(zip(short, known, strict=True))
        for place in sorted(set(range(len(texts))) - set(short)):
            (found[place], _), _ = self._score(self._begin(), texts[place])
            self.cache_hook.add_partial("loglikelihood_rolling", requests[place].args, found[place])
        self._begin()
        return [found[place] for place in range(len(texts))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, which it is not part of."""
        found: dict[int, str] = {}
        contexts = [self._bare(self.tok_encode(request.args[0])) for request in requests]
        self.longest = max([self.longest, *map(len, contexts)])
        news = [normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests]
        short = [place for place, ids in enumerate(contexts) if self._fits(len(ids), num_new=news[place])]
        self._begin()
        if short:
            known = super().generate_until([requests[place] for place in short], disable_tqdm)
            found.update(zip(short, known, strict=True))
        for place in sorted(set(range(len(contexts))) - set(short)):
            found[place] = self._write(contexts[place], requests[place].args[1])
            self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
        self._begin()
        return [found[place] for place in range(len(contexts))]

    def _write(self, context: Sequence[int], wishes: dict[str, Any]) -> str:
        stream = self._begin()
        self._read(stream, context)
        kwargs = normalize_gen_kwargs(wishes, self.max_gen_toks)
        stop = handle_stop_sequences(
            kwargs.pop("until", None), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        ids_1T = torch.tensor([self._prefix(stream)], device=self.device)
        room = self.max_length - ids_1T.shape[1]
        written = self._model_generate(
            context=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            stop=stop,
            max_length=ids_1T.shape[1] + min(kwargs.pop("max_gen_toks"), room),
            **kwargs,
        )
        answer = self.tok_decode(written[0, ids_1T.shape[1] :].tolist())
        return str(postprocess_generated_text(generation=answer, stop=stop, think_end_token=None))


def _name_of(memory: Path) -> str:
    """Name of a memory's folder, wherever it lies, and eight digits of its weights' hash."""
    with (memory / "adapter_model.safetensors").open("rb") as file:
        return f"{memory.resolve().name} {hashlib.file_digest(file, 'sha256').hexdigest()[:8]}"


def _settings(saved: Memory | None, config: str | None, window: int | None) -> Preset:
    settings = preset("default") if saved is None else Preset(absorb=saved.config, stream=saved.stream)
    if config is not None:
        settings = read_toml(Path(config), settings)
    if window is None:
        return settings
    if not isinstance(window, int) or window < _SMALLEST_WINDOW:
        raise ConfigError(f"window is a whole number of tokens, {_SMALLEST_WINDOW} or more; got {window!r}")
    context = window // 3
    stream = settings.stream.replace(context_tokens=context, sync_tokens=window - context)
    return Preset(absorb=settings.absorb, stream=stream)
