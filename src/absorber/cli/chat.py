"""`absorber chat`: a conversation without an end."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from absorber.cli.console import Output, Rounds
from absorber.cli.opening import KeptSession, open_session
from absorber.cli.options import JsonFlag, ModelFlag, Settings, check_output
from absorber.cli.source import standard_input
from absorber.errors import AbsorberError
from absorber.text import decode

_END = "/exit"


def chat(
    memory: Path | None = None,
    /,
    *,
    session: Path | None = None,
    model: ModelFlag = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Talk with a model; what leaves its window is absorbed.

    One message a line, from the keyboard or a pipe. /exit or Ctrl-D ends it; Ctrl-C stops an answer.

    Args:
        memory: Folder of a memory to begin with; it stays as it is.
        session: Folder to keep the conversation in and to go on from; without it the conversation is forgotten.
        model: Hub id, folder, .gguf file, or "tiny"; that of the memory or session, or SmolLM2-135M-Instruct, if
            left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    settings.resolve()
    from absorber.saved_session import STATE
    from absorber.store import locked

    if session is not None:
        check_output(session, marker=STATE)
    with locked(session) if session is not None else contextlib.nullcontext():
        kept, rounds = open_session(session, settings, report, model=model, device=device, memory=memory)
        return _converse(report, kept, rounds)


def _converse(report: Output, kept: KeptSession, rounds: Rounds) -> int:
    code = 0
    try:
        for message in _messages(report):
            _reply(report, kept, rounds, message)
    except KeyboardInterrupt:
        code = 130
    except AbsorberError as error:
        kept.save_after(error)
        raise
    if kept.changed:
        kept.save()
    report.event("done", num_tokens=kept.session.num_tokens, interrupted=code != 0, **rounds.facts())
    return code


def _messages(report: Output) -> Iterator[str]:
    """The lines of the user, until there are no more."""
    keyboard = _is_keyboard()
    if keyboard and not report.json_lines:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lets input() edit its line
        report.say("type a message; /exit or Ctrl-D ends, Ctrl-C stops an answer")
    while True:
        if keyboard:
            try:
                line = input("" if report.json_lines else "> ")
            except EOFError:
                return
        else:
            raw = standard_input().readline()
            if not raw:
                return
            line = "".join(decode([raw], "the message"))
        if line.strip() == _END:
            return
        if line.strip():
            yield line.strip()


def _is_keyboard() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _reply(report: Output, kept: KeptSession, rounds: Rounds, message: str) -> None:
    written: list[str] = []
    stopped = False
    try:
        for piece in kept.session.generate(message):
            written.append(piece)
            if not report.json_lines:
                report.write(piece)
    except KeyboardInterrupt:
        stopped = True
    if not report.json_lines:
        report.write(" [stopped]\n" if stopped else "\n")
    report.event(
        "reply",
        message=message,
        text="".join(written).strip(),
        stopped=stopped,
        num_tokens=kept.session.num_tokens,
        num_rounds=rounds.accepted + rounds.rolled_back,
    )
