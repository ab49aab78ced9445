"""What a command shows: results on stdout and progress on stderr, or with --json one object a line on stdout."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from absorber.cli.source import Source
    from absorber.memory import Round
    from absorber.progress import Progress as Standing

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


class _QuietPipeConsole(Console):
    """A console that goes on in silence when its reader has left: what runs is worth more than what is shown."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _silence(self.file.fileno())


def _silence(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class Output:
    """Where a command's words go. Text of users and models is never read as markup."""

    def __init__(self, *, json_lines: bool) -> None:
        """Choose between lines for people and lines for programs."""
        self.json_lines = json_lines
        # A pipe has no width: paths and answers must not be broken there.
        width = None if sys.stdout is not None and sys.stdout.isatty() else 200
        self._results = _QuietPipeConsole(markup=False, highlight=False, emoji=False, width=width)
        self.progress = _QuietPipeConsole(stderr=True, markup=False, highlight=False, emoji=False)

    def event(self, name: str, **facts: Any) -> None:
        """Write one object, for programs alone."""
        if self.json_lines:
            self.write(json.dumps(_finite({"event": name, **facts}), ensure_ascii=False) + "\n")

    def say(self, line: str) -> None:
        """Tell of something that takes long or that happened on the way."""
        self.event("note", message=line)
        if not self.json_lines:
            self.progress.print(Text(line, style="dim"), soft_wrap=True)

    def show(self, line: str) -> None:
        """Write a line of the result, for people alone."""
        if not self.json_lines:
            self._results.print(Text(line), soft_wrap=True)

    def write(self, text: str) -> None:
        """Write to stdout as it is, at once."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            _silence(sys.stdout.fileno())

    def table(self, rows: Sequence[Sequence[str]], *, heads: Sequence[str] = ()) -> None:
        """Write a table, for people alone."""
        if self.json_lines:
            return
        table = Table(show_header=bool(heads), box=None, pad_edge=False)
        for index in range(len(rows[0])):
            table.add_column(Text(heads[index]) if heads else "", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._results.print(table)

    def fail(self, kind: str, message: str) -> None:
        """Report the error that ends the command."""
        self.event("error", type=kind, message=message)
        if not self.json_lines:
            self.progress.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)

    def interrupted(self, message: str, **facts: Any) -> None:
        """Report that Ctrl-C ended the command, and what became of the work."""
        self.event("interrupted", message=message, **facts)
        if not self.json_lines:
            self.progress.print(Text(f"interrupted: {message}", style="yellow"), soft_wrap=True)

    def round(self, line: "Round", **facts: Any) -> None:
        """Report a round of the ledger."""
        self.event("round", **dataclasses.asdict(line), rolled_back=line.rolled_back, **facts)
        if not self.json_lines:
            undone = f", {line.outcome.replace('_', ' ')}" if line.rolled_back else ""
            self.progress.print(
                Text(
                    f"round {line.number}: {line.context_tokens} tokens, loss {line.loss_before:.3f} -> "
                    f"{line.loss_after:.3f} in {line.num_steps} steps, {line.seconds:.1f} s{undone}",
                    style="yellow" if line.rolled_back else "dim",
                ),
                soft_wrap=True,
            )


class Rounds:
    """What the rounds of this command did; the progress callback of a session."""

    def __init__(self, output: Output) -> None:
        """Begin with none."""
        self._output = output
        self._losses: list[tuple[float, float]] = []
        self.accepted = 0
        self.rolled_back = 0
        self.idle = 0
        """Rounds whose loss was below the threshold before the first step, so that nothing was learned."""
        self.num_tokens = 0
        self.on_change: Callable[[Standing], None] | None = None
        """Called with every report; a progress display sets it."""
        self.on_round: Callable[[], None] | None = None
        """Called after every round."""

    def __call__(self, standing: "Standing") -> None:
        """Take one report of a session."""
        line = standing.finished
        if line is not None:
            self.rolled_back += line.rolled_back
            self.accepted += not line.rolled_back
            self.idle += line.num_steps == 0
            self.num_tokens += line.context_tokens
            self._losses.append((line.loss_before, line.loss_after))
            if self.on_change is None or line.rolled_back:
                self._output.round(line, num_tokens=standing.num_tokens)
        if self.on_change is not None:
            self.on_change(standing)
        elif standing.work == "writing anchors" and standing.step == 0:
            self._output.say("before the first round, texts are written to which the model will be held")
        if line is not None and self.on_round is not None:
            self.on_round()

    def mean_losses(self) -> tuple[float, float] | None:
        """The mean over rounds of the loss before the first step and after the last."""
        if not self._losses:
            return None
        count = len(self._losses)
        return sum(before for before, _ in self._losses) / count, sum(after for _, after in self._losses) / count

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        before, after = self.mean_losses() or (None, None)
        return {
            "num_rounds": self.accepted + self.rolled_back,
            "num_rolled_back": self.rolled_back,
            "num_idle": self.idle,
            "absorbed_tokens": self.num_tokens,
            "loss_before": before,
            "loss_after": after,
        }

    def warn_of_idle(self) -> None:
        """Say so if rounds ended before their first step."""
        if self.idle:
            total = self.accepted + self.rolled_back
            self._output.say(
                f"warning: in {self.idle} of {total} rounds the loss was below the threshold before the first step, so "
                "nothing was learned; set a smaller threshold in the [absorb] table of --config"
            )

    def loss_line(self) -> str:
        """The same for people."""
        losses = self.mean_losses()
        return f"{losses[0]:.3f} -> {losses[1]:.3f} (mean over rounds)" if losses else "no round yet"


@contextlib.contextmanager
def shown_progress(output: Output, rounds: Rounds, source: "Source") -> Iterator[None]:
    """Show how a source is read: a bar on a terminal, else a line per round."""
    if output.json_lines or not output.progress.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=output.progress, transient=True) as display:
        task = display.add_task("reading", total=source.num_bytes)

        def change(standing: "Standing") -> None:
            display.update(task, completed=source.bytes_read, description=spell_standing(standing))

        rounds.on_change = change
        try:
            yield
        finally:
            rounds.on_change = None


def spell_standing(standing: "Standing") -> str:
    """Say in a line what a session is doing."""
    running = standing.num_rounds + (standing.finished is None)
    place = f"{standing.step}/{standing.max_steps}"
    if standing.work != "synchronizing":
        return f"round {running} · {standing.work} {place}"
    return f"round {running} · step {place} · loss {standing.loss:.3f}"


def spell_bytes(count: float) -> str:
    """Write a number of bytes as people read it."""
    power = min(int(math.log(max(count, 1), 1000)), len(_UNITS) - 1)
    return f"{count:.0f} {_UNITS[0]}" if power == 0 else f"{count / 1000**power:.1f} {_UNITS[power]}"


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for (NaN, infinity) by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
