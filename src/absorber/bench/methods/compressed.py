"""Caches that are read whole and then compressed to the size of the window: SnapKV and KVzip, by kvpress.

kvpress needs a transformers older than ours, so that it runs in an environment of its own, in a process that is given
the model and the tokens and gives back hidden states (`kvpress_worker`). The cache keeps as many entries as the window
of all other methods has tokens, and its sink; the press reads the stream anew whenever it is asked, as much of its end
as the model has positions for.

Shapes: B streams, T tokens, D hidden.
"""

import json
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from absorber.backbone import with_sink
from absorber.bench.methods.reader import Method, Reader, Setting
from absorber.bench.reading import KeptReading
from absorber.errors import AbsorberError, BenchmarkError, ConfigError, MissingExtraError

ENVIRONMENT = "ABSORBER_KVPRESS_PYTHON"
"""Environment variable that names the Python of the environment with kvpress."""
WORKER = Path(__file__).with_name("kvpress_worker.py")
"""The program that it runs."""

_PRESSES = ("snapkv", "kvzip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed(Method):
    """A compressed cache.

    Raises:
        ConfigError: If there is no such press.
    """

    press: Literal["snapkv", "kvzip"]
    """SnapKV (arXiv 2404.14469) keeps what the last tokens attend to, KVzip (arXiv 2505.23416) what the model needs to
    repeat the text."""
    python: str = ""
    """Python of the environment with kvpress; that of `$ABSORBER_KVPRESS_PYTHON` if left out."""

    def __post_init__(self) -> None:
        if self.press not in _PRESSES:
            raise ConfigError(f"press is one of {', '.join(_PRESSES)}; got {self.press!r}")

    @property
    def where(self) -> str:
        """The Python to use; empty if nobody named one."""
        return self.python or os.environ.get(ENVIRONMENT, "")

    def begin(self, setting: Setting) -> Reader:
        """Make a reader for B fresh streams.

        Raises:
            MissingExtraError: If there is no environment with kvpress.
        """
        if not self.where:
            raise MissingExtraError(_how_to(f"{self.press} needs kvpress in an environment of its own"))
        return _CompressedReader(setting, self)

    def config(self) -> dict[str, Any]:
        """What was done, not where."""
        return {"press": self.press}


def _how_to(what: str) -> str:
    return (
        f"{what}, for it wants an older transformers: python3 -m venv kvpress && kvpress/bin/pip install torch "
        f"'transformers<5.3' kvpress==0.5.5 && export {ENVIRONMENT}=$PWD/kvpress/bin/python"
    )


class _CompressedReader(Reader):
    def __init__(self, setting: Setting, method: Compressed) -> None:
        super().__init__(setting)
        self._read_BT = self.recent_BT
        self._reading: KeptReading | None = None
        self._worker = Worker(method.where)
        self._folder = tempfile.TemporaryDirectory(prefix="absorber-")  # kvzip reads its tokenizer for every text
        _save(setting, Path(self._folder.name))
        dtype = str(setting.backbone.model.dtype).removeprefix("torch.")
        device = str(setting.backbone.device)
        try:
            self._worker.ask("begin", folder=self._folder.name, press=method.press, device=device, dtype=dtype)
        except AbsorberError:
            self.close()
            raise

    def read(self, token_ids_BT: Tensor) -> None:
        super().read(token_ids_BT)
        self._read_BT = torch.cat([self._read_BT, token_ids_BT], dim=1)[:, -self.setting.most_tokens :]
        self._reading = None

    def reading(self) -> KeptReading:
        if self._reading is None:
            rows = with_sink(self.setting.sink_id, self._read_BT).tolist()
            reply, last_BD = self._worker.ask("compress", ids=rows, keep=self.kept_tokens + 1)
            self._reading = _RemoteReading(self.setting, self._worker, last_BD)
            self.kept_entries: list[float] = reply["kept"]
        return self._reading

    def close(self) -> None:
        self._worker.close()
        self._folder.cleanup()


def _save(setting: Setting, folder: Path) -> None:
    """The model as it is, and its tokenizer without a chat template: a stream of text is no turn of a chat."""
    setting.backbone.model.save_pretrained(folder)
    if setting.guide is not None:
        setting.guide.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        settings = folder / "tokenizer_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        values.pop("chat_template", None)
        settings.write_text(json.dumps(values), encoding="utf-8")


class _RemoteReading(KeptReading):
    """A reading whose cache is in the other process."""

    def __init__(self, setting: Setting, worker: "Worker", last_BD: Tensor, fork: int = 0) -> None:
        super().__init__(setting.backbone)
        self._setting, self._worker, self._fork = setting, worker, fork
        self._owns = False
        self.last_BD = last_BD.to(setting.backbone.device)

    def fork(self) -> "_RemoteReading":
        return _RemoteReading(self._setting, self._worker, self.last_BD, self._fork)

    def read(self, ids_BT: Tensor) -> Tensor:
        reply, states_BTD = self._worker.ask("extend", fork=self._fork, ids=ids_BT.tolist(), in_place=self._owns)
        self._fork, self._owns = reply["fork"], True
        return states_BTD.to(self._setting.backbone.device)

    def __del__(self) -> None:
        if self._owns and self._worker.is_running:
            self._worker.ask("drop", fork=self._fork)


class Worker:
    """A process that answers requests, one at a time."""

    def __init__(self, python: str) -> None:
        """Start it.

        Raises:
            MissingExtraError: If there is no such Python.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except OSError as error:
            self._log.close()
            raise MissingExtraError(
                _how_to(f"there is no Python {python} ({error.strerror}); kvpress needs one")
            ) from error

    @property
    def is_running(self) -> bool:
        """Whether it still answers."""
        return self._process.poll() is None

    def ask(self, operation: str, **values: Any) -> tuple[dict[str, Any], Tensor]:
        """Make a request and wait for the reply.

        Returns:
            The reply, and the numbers that come with it (none if it has none).

        Raises:
            MissingExtraError: If kvpress is not installed there.
            BenchmarkError: If the process has ended, or could not do it.
        """
        send, receive = self._process.stdin, self._process.stdout
        assert send is not None
        assert receive is not None
        try:
            send.write(json.dumps({"op": operation, **values}).encode() + b"\n")
            send.flush()
            line = receive.readline()
        except OSError:
            line = b""
        if not line:
            raise BenchmarkError(f"the process with kvpress has ended: {self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            if reply["error"].startswith("ModuleNotFoundError"):
                raise MissingExtraError(
                    _how_to(f"that environment lacks a package ({reply['error']}); kvpress needs one")
                )
            raise BenchmarkError(f"kvpress cannot do this: {reply['error']}")
        shape = reply.get("shape", [0])
        body = receive.read(4 * math.prod(shape))
        if len(body) < 4 * math.prod(shape):
            raise BenchmarkError(f"the process with kvpress ended within a reply: {self._last_words()}")
        numbers = torch.frombuffer(bytearray(body), dtype=torch.float32) if body else torch.zeros(0)
        return reply, numbers.reshape(shape)

    def close(self) -> None:
        """End it."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
