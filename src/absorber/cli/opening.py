"""Opening what a command works on: a model, and a session that is kept in a folder."""

import contextlib
import signal
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absorber.cli.console import Output, Rounds
from absorber.cli.options import Settings, check_output, refuse_change, saved_settings
from absorber.errors import AbsorberError, AbsorptionError, ConfigError

if TYPE_CHECKING:
    from absorber.memory import Memory
    from absorber.session import Session

_SAVE_EVERY_SECONDS = 60.0


def model_source(name: str | None) -> str | None:
    """Return the model to load; a folder becomes absolute, for a memory names it to whoever asks from elsewhere."""
    if name is None or name in ("default", "tiny") or name.endswith(".gguf"):
        return name
    if Path(name).is_dir():
        return str(Path(name).resolve())
    _expect_no_hub_without_network()
    return name


def _expect_no_hub_without_network() -> None:
    """Let huggingface_hub look in its cache alone if the hub's name is not found: it would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def open_model(name: str | None, output: Output, *, device: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its tokenizer, without the words of the libraries that do it.

    Raises:
        AbsorberError: As `absorber.load`.
    """
    quiet_libraries()
    from absorber.models import load

    output.say(f"loading the model {name or 'default'}")
    return load(model_source(name), device=device, dtype=dtype, say=output.say)  # type: ignore[arg-type]


def quiet_libraries() -> None:
    """Keep progress bars and advice of transformers and huggingface_hub off the terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait while a folder is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class KeptSession:
    """A session that is saved to its folder every minute and at the end, or one without a folder."""

    def __init__(self, session: "Session", folder: Path | None, rounds: Rounds, *, resumed: bool) -> None:
        """Begin to keep it."""
        self.session = session
        self.resumed = resumed
        """Whether it was there before."""
        self.saved = False
        """Whether this command has written it."""
        self._folder, self._rounds = folder, rounds
        self._tokens_before, self._rounds_before = session.num_tokens, session.memory.num_rounds
        self._saved_at = time.monotonic()
        rounds.on_round = self._save_sometimes

    @property
    def new_tokens(self) -> int:
        """Tokens read by this command."""
        return self.session.num_tokens - self._tokens_before

    @property
    def changed(self) -> bool:
        """Whether there is anything to write: pending text may be absorbed without new tokens in the window."""
        return self.new_tokens > 0 or self.session.memory.num_rounds > self._rounds_before

    def save(self) -> None:
        """Write it now.

        Raises:
            MemoryFileError: If it cannot be written.
        """
        if self._folder is None:
            return
        with uninterrupted():
            self.session.save(self._folder)
        self.saved, self._saved_at = True, time.monotonic()

    def save_after(self, error: AbsorberError) -> None:
        """Write what was read before an error, unless a new session could not absorb anything at all.

        Such a session would go on with the settings that just failed, because they do not change.
        """
        in_vain = isinstance(error, AbsorptionError) and not self.resumed and not self._rounds.accepted
        if self.changed and not in_vain:
            self.save()

    def _save_sometimes(self) -> None:
        if self._rounds.accepted and time.monotonic() - self._saved_at > _SAVE_EVERY_SECONDS:
            self.save()


def open_memory(folder: Path, model: Any, tokenizer: Any) -> "Session":
    """A session on a saved session, or on a saved memory with an empty window.

    Raises:
        MemoryFileError: If the folder is neither.
        MemoryMismatchError: If it is of another model.
    """
    from absorber.memory import Memory
    from absorber.saved_session import is_session
    from absorber.session import Session

    if is_session(folder):
        return Session.resume(folder, model, tokenizer)
    return Session(model, tokenizer, memory=Memory.load(folder, model))


def open_session(
    folder: Path | None,
    settings: Settings,
    output: Output,
    *,
    model: str | None,
    device: str,
    memory: Path | None = None,
) -> tuple[KeptSession, Rounds]:
    """Resume the session in a folder, or begin one; call it with the folder's lock held.

    Args:
        folder: Where it is kept; None for a session that is forgotten at the end.
        settings: The flags; a resumed session refuses those that would change it.
        output: Where to report.
        model: The model; that of the session or memory if left out.
        device: Where it runs.
        memory: A saved memory to begin with.

    Raises:
        AbsorberError: If one of them cannot be used. Nothing was written then.
    """
    from absorber.saved_session import STATE, is_session, saved_base
    from absorber.session import Session

    rounds = Rounds(output)
    if folder is not None and is_session(folder):
        if memory is not None:
            raise ConfigError(f"{folder} already holds a session, which has a memory; leave {memory} out")
        saved = saved_settings(folder / "memory")
        refuse_change(settings.resolve(saved), saved)
        loaded = open_model(model or saved_base(folder), output, device=device)
        resumed = Session.resume(folder, *loaded, progress=rounds)
        return KeptSession(resumed, folder, rounds, resumed=True), rounds
    if folder is not None:
        check_output(folder, marker=STATE)
    start = open_start(memory, settings, output, model=model, device=device)
    session = Session(start.model, start.tokenizer, start.config, start.stream, memory=start.memory, progress=rounds)
    return KeptSession(session, folder, rounds, resumed=False), rounds


class Start:
    """A model, settings, and the memory to go on from, if there is one."""

    def __init__(self, loaded: tuple[Any, Any], settings: Any, memory: "Memory | None") -> None:
        """Hold them."""
        self.model, self.tokenizer = loaded
        self.config, self.stream = settings.absorb, settings.stream
        self.memory = memory


def open_start(memory: Path | None, settings: Settings, output: Output, *, model: str | None, device: str) -> Start:
    """Load what a new memory or session begins with.

    Raises:
        AbsorberError: If one of them cannot be used.
    """
    from absorber.memory import Memory

    wanted = settings.resolve(None if memory is None else saved_settings(memory))
    if memory is not None:
        model = model or str(Memory.provenance(memory)["base"])
    loaded = open_model(model, output, device=device)
    return Start(loaded, wanted, None if memory is None else Memory.load(memory, loaded[0]))
