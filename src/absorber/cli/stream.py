"""`absorber stream`: an endless text is read into a session."""

import shlex
import time
from pathlib import Path

from absorber.cli.console import Output, Rounds, shown_progress
from absorber.cli.opening import KeptSession, open_session
from absorber.cli.options import JsonFlag, ModelFlag, Settings, SourceArgument, check_output
from absorber.cli.source import Source, open_source
from absorber.errors import AbsorberError, DivergedError


def stream(
    source: SourceArgument,
    /,
    *,
    session: Path,
    model: ModelFlag = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Read a text into a session: the newest in a window, the older absorbed.

    The session is saved every minute and at the end. A file is gone on with where the session stopped in it;
    standard input is read as it comes. Ctrl-C ends it and keeps what was read.

    Args:
        source: A text file in UTF-8, or - for standard input.
        session: Folder of the session; it is made if there is none.
        model: Hub id, folder, .gguf file, or "tiny"; that of the session, or SmolLM2-135M-Instruct, if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    settings.resolve()
    text = open_source(source, live=True)
    from absorber.saved_session import STATE
    from absorber.store import locked

    check_output(session, marker=STATE)
    with locked(session):
        kept, rounds = open_session(session, settings, report, model=model, device=device)
        return _read(report, text, session, kept, rounds)


def _read(report: Output, text: Source, folder: Path, kept: KeptSession, rounds: Rounds) -> int:
    started = time.monotonic()
    try:
        with shown_progress(report, rounds, text):
            _feed(text, kept)
        memory = kept.session.memory
        if 0 < memory.num_rounds == memory.num_rolled_back:
            raise DivergedError(
                f"all {memory.num_rounds} rounds were rolled back because their loss rose or was not finite, so "
                "nothing was absorbed; use a smaller --learning-rate"
            )
    except KeyboardInterrupt:
        if kept.changed:
            kept.save()
        place = f"saved to {folder}" if kept.saved else "nothing new was read, so nothing was written"
        report.interrupted(
            f"{kept.new_tokens} tokens read, {place}",
            new_tokens=kept.new_tokens,
            saved=str(folder) if kept.saved else None,
            **rounds.facts(),
        )
        return 130
    except AbsorberError as error:
        kept.save_after(error)
        raise
    kept.save()
    num_window = len(kept.session.window_ids)
    report.event(
        "done",
        **rounds.facts(),
        new_tokens=kept.new_tokens,
        num_tokens=kept.session.num_tokens,
        window_tokens=num_window,
        seconds=round(time.monotonic() - started, 3),
        folder=str(folder),
    )
    report.table(
        [
            ("tokens read now", f"{kept.new_tokens:,}"),
            ("tokens in all", f"{kept.session.num_tokens:,} ({num_window:,} in the window, the others absorbed)"),
            ("rounds now", f"{rounds.accepted + rounds.rolled_back} ({rounds.rolled_back} rolled back)"),
            ("loss", rounds.loss_line()),
            ("session", str(folder)),
        ]
    )
    rounds.warn_of_idle()
    report.show(f'\nnext: absorber ask {shlex.quote(str(folder))} "What happened last?"')
    return 0


def _feed(text: Source, kept: KeptSession) -> None:
    from absorber.text import cut

    if text.key is not None:
        kept.session.read(text.key, text.parts())
    else:
        for piece in cut(text.parts()):
            kept.session.append(piece)
    kept.session.flush()
