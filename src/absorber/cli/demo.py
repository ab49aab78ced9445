"""`absorber demo`: the main job once, on a book that comes with Absorber."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from absorber.cli.console import Output, Rounds, spell_bytes, spell_standing
from absorber.cli.opening import open_model, uninterrupted
from absorber.cli.options import JsonFlag, ModelFlag, check_output
from absorber.errors import ConfigError, MissingExtraError
from absorber.store import write_json

if TYPE_CHECKING:
    from absorber.bench.demo import Demonstration
    from absorber.memory import Memory
    from absorber.progress import Progress as Standing

_PICTURE, _FIGURES, _MEMORY = "demo.png", "demo.json", "memory"


def demo(
    *,
    output: Path = Path("demo"),
    model: ModelFlag = None,
    rounds: Annotated[int | None, Parameter(name="--rounds")] = None,
    seed: int = 0,
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Stream a book through a small window, absorb what leaves it, and measure what that was worth.

    Args:
        output: Folder for the memory, the picture and the figures.
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        rounds: How many contexts to absorb; ten if left out.
        seed: Of the adapter's first weights.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    started = time.monotonic()
    if rounds is not None and not 1 <= rounds <= 40:
        raise ConfigError(f"rounds must be between 1 and 40; got {rounds}")
    _check_place(output)
    loaded = open_model(model, report, device=device)
    from absorber.bench.demo import BOOK, CONFIG, NUM_ROUNDS, STREAM, demonstrate, draw

    rounds = rounds or NUM_ROUNDS
    counted = Rounds(report)
    report.say(f"streaming {BOOK} through a window of {STREAM.window_tokens} tokens")

    def keep(memory: "Memory") -> None:
        if counted.accepted:
            with uninterrupted():
                memory.save(output / _MEMORY)

    try:
        with _shown(report, counted, rounds):
            shown = demonstrate(
                *loaded,
                config=CONFIG.replace(seed=seed),
                stream=STREAM,
                num_rounds=rounds,
                progress=counted,
                say=report.say,
                keep=keep,
            )
    except KeyboardInterrupt:
        place = f"the memory of {counted.accepted} rounds is in {output / _MEMORY}" if counted.accepted else ""
        report.interrupted(place or "no round was finished, so nothing was written", **counted.facts())
        return 130
    output.mkdir(parents=True, exist_ok=True)
    seconds = round(time.monotonic() - started, 1)
    write_json(output / _FIGURES, shown.to_dict() | {"seconds": seconds})
    draw(shown, output / _PICTURE)
    report.event("done", **shown.to_dict(), seconds=seconds, folder=str(output))
    _show(report, shown, output, seconds)
    return 0


def _check_place(output: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("the picture needs matplotlib: pip install 'absorber[bench]'") from error
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; choose a folder with --output")
    check_output(output / _MEMORY, marker="absorber.json")


@contextlib.contextmanager
def _shown(report: Output, counted: Rounds, num_rounds: int) -> Iterator[None]:
    """A bar over all steps on a terminal, else a line per round."""
    if report.json_lines or not report.progress.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rounds"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=report.progress) as display:
        task = display.add_task("reading", total=num_rounds)

        def change(standing: "Standing") -> None:
            within = standing.finished is None and standing.work == "synchronizing"
            done = standing.num_rounds + (standing.step / (standing.max_steps + 1) if within else 0)
            display.update(task, completed=done, description=spell_standing(standing))

        counted.on_change = change
        try:
            yield
        finally:
            counted.on_change = None


def _show(report: Output, shown: "Demonstration", output: Path, seconds: float) -> None:
    note = f" ({shown.weights_note})" if shown.weights_note else ""
    held, full = max(shown.window_cache_bytes), shown.full_cache_bytes[-1]
    worth = round(shown.memory_bytes * shown.num_tokens / full)
    report.table(
        [
            ("model", f"{shown.model}{note}"),
            ("tokens read", f"{shown.num_tokens:,}"),
            ("rounds", f"{len(shown.rounds)} ({sum(line.rolled_back for line in shown.rounds)} rolled back)"),
            ("window", f"{shown.window_tokens} tokens"),
            ("cache held at most", f"{spell_bytes(held)}, however long the text"),
            ("full attention would hold", f"{spell_bytes(full)}, and more with every token"),
            ("memory", f"{spell_bytes(shown.memory_bytes)}, as much as the cache of {worth:,} tokens, and never more"),
            ("time", f"{seconds:.0f} s"),
        ]
    )
    report.show("")
    report.table(
        [
            (str(line.number), f"{line.loss_before:.4f}", f"{line.loss_after:.4f}", line.outcome.replace("_", " "))
            for line in shown.rounds
        ],
        heads=("round", "synchronization loss before", "after", "outcome"),
    )
    report.show("")
    report.table(
        [
            ("full attention", f"{shown.nll_full:.4f}", ""),
            ("window only", f"{shown.nll_window:.4f}", ""),
            ("window with memory", f"{shown.nll_window_memory:.4f}", _percent(shown.windowed_gap_closed)),
            ("nothing", f"{shown.nll_nothing:.4f}", ""),
            ("memory alone", f"{shown.nll_memory:.4f}", _percent(shown.contextless_gap_closed)),
        ],
        heads=(f"the next {shown.passage_tokens} tokens given", "nll, nats per token", "gap closed"),
    )
    report.show(
        "\nThe memory helped."
        if shown.helped
        else "\nTHE MEMORY DID NOT HELP: the passage is not more likely with it, in view of a window or without."
    )
    report.show("Gap closed: 100 % is as good as full attention over all the text; below 0 % is worse than no memory.")
    report.show(f"\n{shown.question}\n  with memory:    {shown.answer}\n  without memory: {shown.answer_without}")
    report.show(
        f"\nsaved: {output / _MEMORY} (the memory), {output / _PICTURE} (picture), {output / _FIGURES} (figures)"
    )
    report.show(f'next:  absorber ask {output / _MEMORY} "Who is Alice?"')


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %" if ratio == ratio else "no gap"
