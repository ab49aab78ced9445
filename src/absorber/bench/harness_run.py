"""lm-evaluation-harness as `absorber eval` runs it: with our tasks, with data of one's own, and with records.

Without a file of records the harness does what it always does. With one it is asked for one task after the other, so
that what is done is kept; its own results are put together again behind that.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from absorber.backbone import base_name
from absorber.bench.eval_tasks import FOLDER
from absorber.bench.harness import AbsorberLM
from absorber.bench.records import Record, append_records, environment, read_records, without_place

Say = Callable[[str], None]

_Z95 = 1.96
_SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1")
# Of what the harness is asked: what makes another measurement of the same task.
_SETTINGS = ("limit", "samples", "num_fewshot", "apply_chat_template", "system_instruction", "gen_kwargs")
# Of --model_args: what is said elsewhere in a record, or changes no figure.
_NO_SETTINGS = ("pretrained", "tokenizer", "device", "dtype", "batch_size", "max_batch_size")


def run_harness(given: Sequence[str], *, records: Path | None, data_dir: Path | None, say: Say) -> int:
    """Run the harness's own command.

    Args:
        given: Its arguments.
        records: File that the figures are added to; what it has already is not measured again.
        data_dir: Folder that our tasks read.
        say: Called with a line of text for each task.

    Returns:
        The exit code.

    Raises:
        AbsorberError: If model, memory, settings, data or the file cannot be used.
    """
    setup_logging()
    before, sys.argv = sys.argv, ["absorber eval", *given]
    try:
        cli = HarnessCLI()
        arguments = cli.parse_args()
        _complete(arguments, data_dir)
        with contextlib.nullcontext() if records is None else _recording(records, say):
            cli.execute(arguments)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = before
    return 0


def _complete(arguments: argparse.Namespace, data_dir: Path | None) -> None:
    """Add our tasks, the folder with data, and a device, which the harness would take to be the first GPU."""
    if not hasattr(arguments, "include_path"):
        return
    path = getattr(arguments, "config", None)
    file = {} if path is None else EvaluatorConfig.load_yaml_config(path)
    theirs = arguments.include_path or file.get("include_path") or []
    arguments.include_path = [str(FOLDER), *([theirs] if isinstance(theirs, str) else theirs)]
    if not hasattr(arguments, "model"):
        return
    if data_dir is not None:
        arguments.metadata = (arguments.metadata or file.get("metadata") or {}) | {"data_dir": str(data_dir.resolve())}
    if (arguments.model or file.get("model")) == "absorber":
        # The harness gives a model the device twice if it stands among the model's arguments as well.
        own = arguments.model_args.pop("device", None) if isinstance(arguments.model_args, dict) else None
        arguments.device = arguments.device or own or file.get("device") or "auto"


@contextlib.contextmanager
def _recording(path: Path, say: Say) -> Iterator[None]:
    """Stand where the harness's command looks for its evaluation, which is looked up anew with each run."""
    lm_eval.simple_evaluate = functools.partial(_measure, path, say)
    try:
        yield
    finally:
        del lm_eval.simple_evaluate


def _measure(path: Path, say: Say, *, tasks: Sequence[Any], model: str, **wishes: Any) -> dict[str, Any] | None:
    """Evaluate the tasks that the file does not have yet, one after the other."""
    from lm_eval.evaluator import simple_evaluate

    known = {record.key for record in read_records(path)}
    loading = {name: wishes[name] for name in ("batch_size", "max_batch_size", "device")}
    lm = get_model(model).create_from_arg_obj(wishes["model_args"], loading)
    run = _Run(model, lm, wishes)
    merged: dict[str, Any] = {}
    for task in _single(tasks, wishes["task_manager"]):
        name = task if isinstance(task, str) else str(task.get("task") or task.get("group"))
        if {run.record(name).key, run.record(name, group=name).key} & known:
            say(f"{name}: already measured, in {path}")
            continue
        run.begin()
        results = simple_evaluate(model=lm, tasks=[task], **wishes)
        if results is None:  # another process of several has them
            continue
        own = list(run.records(name, results))
        append_records(path, own)
        say(f"{name}: {run.seconds:.0f} s, {len(own)} records in {path}")
        for key, value in results.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    if not merged:
        return None
    merged["config"]["model"] = model  # and not the name of the class, as of a model that was given
    return merged


def _single(tasks: Sequence[Any], manager: Any) -> list[Any]:
    """Part tags into their tasks; a group, whose tasks may have a figure together, stays one."""
    found: list[Any] = []
    for task in tasks:
        entry = manager.task_index.get(task) if isinstance(task, str) else None
        found += sorted(entry.tags) if entry is not None and entry.tags and entry.yaml_path is None else [task]
    return found


class _Run:
    """What the records of one run of the harness have in common."""

    def __init__(self, method: str, lm: Any, wishes: Mapping[str, Any]) -> None:
        """Take what is known before anything is measured."""
        self._lm = lm
        own: dict[str, Any] = {name: wishes[name] for name in _SETTINGS if wishes.get(name)}
        if "num_fewshot" in own:
            own["fewshot_seed"] = wishes["fewshot_random_seed"]
        given = {key: value for key, value in wishes["metadata"].items() if key not in wishes["model_args"]}
        given.pop("data_dir", None)
        self._settings = json.loads(json.dumps(own | given, default=str))
        config = (
            lm.settings
            if isinstance(lm, AbsorberLM)
            else {key: str(value) for key, value in wishes["model_args"].items() if key not in _NO_SETTINGS}
        )
        device = torch.device(getattr(lm, "device", "cpu"))
        base = getattr(lm, "model", None)
        self._facts = environment(device) | {
            "task": "eval",
            "method": method,
            "model": str(wishes["model_args"].get("model", method)) if base is None else without_place(base_name(base)),
            "dtype": str(getattr(base, "dtype", "unknown")).removeprefix("torch."),
            "seed": wishes["random_seed"] or 0,
        }
        self._facts["versions"] |= {"lm_eval": version("lm_eval")}
        self._config = json.loads(json.dumps(config))
        self._cuda = device.type == "cuda"
        self.seconds = 0.0

    def begin(self) -> None:
        """Begin to measure a task."""
        self._started = time.perf_counter()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        if isinstance(self._lm, AbsorberLM):
            self._lm.num_absorbed = self._lm.longest = 0

    def record(self, kind: str, *, group: str | None = None, **values: Any) -> Record:
        """Make a record of a task; one without values is there for its key."""
        task = {"kind": kind, **({} if group is None else {"group": group}), **self._settings}
        blank = {"metric": "", "value": 0.0, "unit": "", "num_samples": 0, "context_length": 0, "round": 0}
        return Record(**self._facts | blank | {"config": {"task": task, "method": self._config}} | values)

    def records(self, name: str, results: Mapping[str, Any]) -> Iterator[Record]:
        """Turn what the harness found, for a task or all tasks of a group, into records."""
        self.seconds = time.perf_counter() - self._started
        ours = self._lm if isinstance(self._lm, AbsorberLM) else None
        facts = {
            "context_length": ours.longest if ours else 0,
            "round": ours.rounds_before if ours else 0,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if self._cuda else 0,
        }
        found: dict[str, dict[str, Any]] = results["results"] | results.get("groups", {})
        for kind, values in found.items():
            group = None if kind == name and kind not in results.get("groups", {}) else name
            members = results.get("group_subtasks", {}).get(kind) or [kind]
            counts = [results["n-samples"][each]["effective"] for each in members if each in results["n-samples"]]
            own: dict[str, Any] = facts | {"group": group, "num_samples": sum(counts)}
            for metric, value, stderr in _figures(values):
                share = metric.split(" ")[0] in _SHARES and 0 <= value <= 1
                low, high = _interval(value, stderr, share=share)
                number = {"value": value, "unit": "ratio" if share else "", "ci95_low": low, "ci95_high": high}
                yield self.record(kind, metric=metric, **own | number)
            if ours and kind == name:
                yield self.record(kind, metric="absorbed_rounds", value=float(ours.num_absorbed), **own)


def _interval(value: float, stderr: float | None, *, share: bool) -> tuple[float | None, float | None]:
    """None for a standard error of 0, as of few answers that are all right: it says nothing."""
    if not stderr:
        return None, None
    low, high = value - _Z95 * stderr, value + _Z95 * stderr
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def _figures(values: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Metric, value and standard error, which the harness has under `metric,filter` and `metric_stderr,filter`."""
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if metric.isdigit() and value == -1:  # RULER has a metric for each length, and this for those that were not run
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        spread = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        yield metric if chosen == "none" else f"{metric} {chosen}", float(value), spread
