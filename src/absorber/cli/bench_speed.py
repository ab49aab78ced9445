"""`absorber bench latency` and `absorber bench cost`: what a token costs, read, written or absorbed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from absorber.cli.bench_run import show_rows
from absorber.cli.console import Output
from absorber.cli.options import JsonFlag
from absorber.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from absorber.bench.records import Record
    from absorber.bench.speed import Sheet


def latency(
    *methods: str,
    output: Path,
    geometry: str = "llama2-7b",
    lengths: str = "",
    batches: str = "1,8",
    tokens: int = 128,
    eager: Annotated[bool, Parameter(negative="")] = False,
    config: Path | None = None,
    repeats: int = 3,
    seconds: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Measure the time of a generated token after N tokens, with and without what absorbing them costs.

    The most important cells come first, each is written when it is done, and what the output file has is not measured
    again. What does not fit the device's memory is recorded as such.

    Args:
        methods: absorber-round, absorber-parts, absorber, absorber-merged, truncation, full, full-eager, or mamba or
            ttt for a geometry of that family; all if left out.
        output: File of records, one JSON object a line.
        geometry: Shape of the model, whose weights are random: llama2-7b, qwen3-4b, smollm2-135m, tiny, mamba-2.8b,
            mamba-130m, mamba-tiny, ttt-7b, ttt-1.3b, ttt-tiny.
        lengths: N, separated by commas; 1024,4096,16384,65536,131072 if left out.
        batches: How many streams go on at once, separated by commas.
        tokens: Generated after the N.
        eager: Record no step of absorbing as a CUDA graph.
        config: TOML file with tables [absorb] and [stream].
        repeats: How often each thing is timed; the median counts.
        seconds: No cell is begun after so many.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: auto, float32, bfloat16, float16.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.backbone import inspect
    from absorber.bench.latency import LENGTHS, Latency

    preset = read_settings(config)
    task = Latency(
        lengths=numbers("lengths", lengths) or LENGTHS,
        batches=numbers("batches", batches),
        num_tokens=tokens,
        eager=eager,
        context_tokens=preset.stream.context_tokens,
        sync_tokens=preset.stream.sync_tokens,
        absorb=preset.absorb,
        repeats=repeats,
    )
    model, sheet = open_sheet("latency", report, geometry=geometry, device=device, dtype=dtype, output=output)
    sheet.fill(task.cells(inspect(model), methods), seconds=seconds)
    return _end(report, sheet)


def cost(
    *,
    output: Path,
    geometry: str = "llama2-7b",
    streams: str = "1,8",
    config: Path | None = None,
    repeats: int = 3,
    seconds: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Measure how many tokens are absorbed a second, against plain training and against one stream after another.

    What the output file has already is not measured again.

    Args:
        output: File of records, one JSON object a line.
        geometry: Shape of the model, whose weights are random: llama2-7b, qwen3-4b, smollm2-135m or tiny.
        streams: How many are absorbed at once, separated by commas.
        config: TOML file with tables [absorb] and [stream].
        repeats: How often each thing is timed; the median counts.
        seconds: No cell is begun after so many.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: auto, float32, bfloat16, float16.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    from absorber.backbone import inspect
    from absorber.bench.cost import Cost
    from absorber.bench.latency import Latency

    preset = read_settings(config)
    task = Latency(
        batches=numbers("streams", streams),
        context_tokens=preset.stream.context_tokens,
        sync_tokens=preset.stream.sync_tokens,
        absorb=preset.absorb,
        repeats=repeats,
    )
    model, sheet = open_sheet("cost", report, geometry=geometry, device=device, dtype=dtype, output=output)
    sheet.fill(Cost(task).cells(inspect(model)), seconds=seconds)
    return _end(report, sheet)


def read_settings(config: Path | None) -> Any:
    """The default preset, with what a TOML file changes.

    Raises:
        ConfigError: If it cannot be read.
    """
    from absorber.config import preset, read_toml

    return preset("default") if config is None else read_toml(config, preset("default"))


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Read whole numbers that commas separate.

    Raises:
        ConfigError: If it is something else.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{name} are whole numbers separated by commas; got {text!r}") from error


def open_sheet(
    task: str, report: Output, *, geometry: str, device: str, dtype: str, output: Path
) -> "tuple[Any, Sheet]":
    """Build a model of random weights, and open the file that its records go into."""
    from absorber.bench.geometry import build_geometry
    from absorber.bench.speed import Sheet
    from absorber.cli.opening import quiet_libraries

    quiet_libraries()
    report.say(f"building {geometry} with random weights")
    model = build_geometry(geometry, device=device, dtype=dtype)

    def on_records(records: "list[Record]") -> None:
        for record in records:
            report.event("record", **{name: getattr(record, name) for name in ("method", "metric", "value", "unit")})

    sheet = Sheet(
        task=task,
        model=geometry,
        device=model.device,
        dtype=model.dtype,
        seed=0,
        output=output,
        say=report.say,
        on_records=on_records,
    )
    return model, sheet


def show_speed(report: Output, records: "Sequence[Record]") -> None:
    """Show a table of those records that are of latency or cost, one for the cells of each method."""
    from absorber.bench.speed import break_even, speed_rows

    found = [record for record in records if record.task in ("latency", "cost")]
    decoding = [record for record in found if not record.method.startswith("absorber-") or "merged" in record.method]
    for part in (decoding, [record for record in found if record not in decoding]):
        if part:
            show_rows(report, *speed_rows(part))
    heads = ("model", "method", "streams", "quicker than full attention from")
    show_rows(report, heads, break_even([record for record in found if record.task == "latency"]))


def _end(report: Output, sheet: "Sheet") -> int:
    show_speed(report, sheet.records)
    report.event("done", num_records=len(sheet.records), failures=sheet.failures, output=str(sheet.output))
    return 0 if not sheet.failures else 1
