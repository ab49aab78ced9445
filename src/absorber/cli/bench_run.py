"""What the commands of `absorber bench` that run methods on a task have in common."""

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absorber.cli.console import Output
from absorber.cli.opening import open_model
from absorber.errors import ConfigError

if TYPE_CHECKING:
    from absorber.bench.figures import Row
    from absorber.bench.methods import Method
    from absorber.bench.records import Record
    from absorber.bench.runner import Listener
    from absorber.bench.task import Task


def read_tables(config: Path | None) -> dict[str, Any]:
    """Read a TOML file of settings; none without a file.

    Raises:
        ConfigError: If it cannot be read, or a table belongs to no task and no method.
    """
    if config is None:
        return {}
    from absorber.bench.everything import TASKS
    from absorber.bench.methods import METHODS, OUTSIDE, others

    try:
        tables = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the settings file {config}: {error}") from error
    known = ["absorb", *TASKS, "families", *METHODS, *OUTSIDE, *others()]
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{config} has {name} outside of any table; put it into that of a task, such as [icl]")
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"do you mean [{near[0]}]?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{config} has a table [{name}], which belongs to no task and no method; {hint}")
    return tables


def make_task(kind_of_task: Any, values: dict[str, Any]) -> Any:
    """Build a task from flags and the table of its name.

    Raises:
        ConfigError: If a setting is unknown or out of range.
    """
    usual = {field.name: field.default for field in dataclasses.fields(kind_of_task)}
    if unknown := sorted(set(values) - set(usual)):
        raise ConfigError(f"unknown setting {', '.join(unknown)} in [{kind_of_task.name}]")
    for name, value in values.items():
        if isinstance(value, list) != isinstance(usual[name], tuple):
            kind = "a list" if isinstance(usual[name], tuple) else "no list"
            raise ConfigError(f"{name} in [{kind_of_task.name}] is {kind}; got {value}")
    if values["kind"] not in kind_of_task.kinds or values["split"] not in ("report", "choose"):
        raise ConfigError(f"kind is one of {', '.join(kind_of_task.kinds)} and split report or choose; got {values}")
    counts = {name: value for name, value in values.items() if name not in ("kind", "split", "seed", "embedder")}
    numbers = [number for value in counts.values() for number in (value if isinstance(value, list) else [value])]
    if not all(isinstance(number, int) and number >= 1 for number in numbers) or values["seed"] < 0:
        raise ConfigError(f"counts are 1 or more and the seed 0 or more; got {values}")
    return kind_of_task(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run_methods(
    task: "Task",
    names: Sequence[str],
    tables: dict[str, Any],
    report: Output,
    *,
    data_dir: Path,
    output: Path,
    batch: int | None,
    model: str | None,
    device: str,
) -> "list[Record]":
    """Load the model and measure methods, all of ours if none is named."""
    from absorber.bench.runner import run_task

    chosen = choose_methods(names, tables)
    task.check(data_dir)
    loaded = open_model(model, report, device=device)
    heard = listener(report, "method")
    return run_task(task, chosen, *loaded, data_dir=data_dir, output=output, batch=batch, listener=heard)


def choose_methods(names: Sequence[str], tables: dict[str, Any]) -> "dict[str, Method]":
    """Find methods, all of ours if none is named.

    A table with the name of a method changes that method; so does [absorb] the method absorber.
    """
    from absorber.bench.methods import METHODS, method

    chosen = {name: method(name) for name in names or METHODS}
    settings = tables | {"absorber": tables.get("absorb", {}) | tables.get("absorber", {})}
    return {name: way.replace(**settings.get(name, {})) for name, way in chosen.items()}


def listener(report: Output, what: str, failures: list[str] | None = None) -> "Listener":
    """Tell the user how a run goes.

    Args:
        report: Where the words go.
        what: What events call the things that are measured.
        failures: Takes the names of those that failed.
    """
    from absorber.bench.runner import Listener

    def on_failure(name: str, error: Exception) -> None:
        report.event("failed", **{what: name}, type=type(error).__name__, message=str(error))
        report.say(f"{name} failed: {error}")
        if failures is not None:
            failures.append(name)

    return Listener(
        say=report.say,
        on_round=lambda name, number: report.event("progress", **{what: name}, round=number),
        on_failure=on_failure,
    )


def show_rows(report: Output, heads: "Row", rows: "Sequence[Row]") -> None:
    """Show a table, if it has rows."""
    if rows:
        report.table(rows, heads=heads)
    for row in rows:
        report.event("row", **dict(zip(heads, row, strict=True)))
