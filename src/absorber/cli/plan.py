"""`absorber plan`: which settings fit a device and keep up with a stream, before anything is loaded."""

import re
from typing import TYPE_CHECKING

from absorber.cli.console import Output, spell_bytes
from absorber.cli.opening import model_source, quiet_libraries
from absorber.cli.options import JsonFlag, ModelFlag
from absorber.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from absorber.planning import Plan, Rates

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def plan(
    *,
    model: ModelFlag = None,
    memory: str | None = None,
    rate: float = 20.0,
    streams: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    tflops: float | None = None,
    bandwidth: float | None = None,
    json: JsonFlag = False,
) -> int:
    """Choose settings that fit a device's memory and keep up with a stream. Nothing is loaded but a model's settings.

    Args:
        model: Hub id, folder, .gguf file, or "tiny"; SmolLM2-135M-Instruct if left out.
        memory: Of the device, for instance 16GB or 24GiB; what is free here if left out.
        rate: Tokens a second that a stream brings.
        streams: How many go on at once.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: Type of the model's weights: auto, float32, bfloat16, float16.
        tflops: The device's rate in products of matrices, in 10^12 operations a second; measured here if left out.
        bandwidth: Of its memory, in GB a second; measured here if left out.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    quiet_libraries()
    from absorber import planning
    from absorber.models import DEFAULT_MODEL, choose_device, choose_dtype, config_of

    if not rate > 0 or streams < 1:
        raise ConfigError(f"rate is above zero and streams 1 or more; got {rate:g} and {streams}")
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    config = config_of(model_source(model))
    if config is None:
        raise ModelError(f"{DEFAULT_MODEL} is not here yet; name another model, or run absorber demo, which fetches it")
    size = _bytes(memory) if memory is not None else _free(place)
    rates = _rates(place, kind, tflops, bandwidth)
    shape = planning.shape_of(config)
    chosen = planning.plan(
        shape,
        memory_bytes=size,
        rate=rate,
        rates=rates,
        weight_bytes=kind.itemsize,
        num_streams=streams,
        device=place.type,
    )
    _show(report, chosen, size, rate, rates)
    report.event("done")
    return 0


def _bytes(text: str) -> int:
    """Read a size such as 16GB."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?)b?", text.strip().lower())
    try:
        return int(float(found[1]) * _UNITS[found[2]]) if found else int("")
    except (ValueError, KeyError) as error:
        raise ConfigError(f"memory is a number of bytes such as 16GB or 24GiB; got {text!r}") from error


def _free(place: "torch.device") -> int:
    from absorber.cli.doctor import _free_bytes

    free = _free_bytes(place)
    if free is None:
        raise ConfigError(f"nobody tells how much memory is free on {place}; give --memory")
    return free


def _rates(place: "torch.device", kind: "torch.dtype", tflops: float | None, bandwidth: float | None) -> "Rates":
    from absorber.bench.speed import copy_rate, matmul_rate
    from absorber.planning import Rates

    return Rates(
        flops=matmul_rate(place, kind) if tflops is None else tflops * 1e12,
        bandwidth=copy_rate(place) if bandwidth is None else bandwidth * 1e9,
    )


def _show(report: Output, chosen: "Plan", size: int, rate: float, rates: "Rates") -> None:
    from dataclasses import asdict

    absorb, stream, needs = chosen.preset.absorb, chosen.preset.stream, chosen.needs
    parts = asdict(needs)
    report.event(
        "plan",
        context_tokens=stream.context_tokens,
        sync_tokens=stream.sync_tokens,
        max_steps=absorb.max_steps,
        rank=absorb.rank,
        checkpointing=absorb.checkpointing,
        quantization=chosen.quantization,
        memory_bytes=size,
        **{f"{part}_bytes": count for part, count in parts.items()},
        total_bytes=needs.total,
        absorb_ms=chosen.absorb_ms,
        decode_ms=chosen.decode_ms,
        merged_decode_ms=chosen.merged_decode_ms,
        break_even_tokens=chosen.break_even_tokens,
        tflops=rates.flops / 1e12,
        bandwidth_gigabytes=rates.bandwidth / 1e9,
    )
    report.show(f"# {spell_bytes(needs.total)} of {spell_bytes(size)} at the peak of a round, expected:")
    report.show("# " + ", ".join(f"{part} {spell_bytes(count)}" for part, count in parts.items()))
    report.show(
        f"# absorbing {chosen.absorb_ms:.3g} ms a token, {rate * chosen.absorb_ms / 10:.0f} % of the time at {rate:g} "
        f"tokens a second; writing {chosen.decode_ms:.3g} ms a token with the memory beside the base, "
        f"{chosen.merged_decode_ms:.3g} merged into a copy of the weights, which needs their memory once more"
    )
    report.show(
        f"# times are estimates, from {rates.flops / 1e12:.3g} TFLOP/s and {rates.bandwidth / 1e9:.3g} GB/s; "
        "activations are counted for the Llama family; study is not counted"
    )
    report.show(
        f"# full attention's cache is larger than all but the weights from {chosen.break_even_tokens:,} tokens on"
    )
    report.show(f"# load the model with quantization {chosen.quantization}")
    report.show(f"[absorb]\nmax_steps = {absorb.max_steps}\nrank = {absorb.rank}")
    report.show(f"checkpointing = {str(absorb.checkpointing).lower()}")
    report.show(f"[stream]\ncontext_tokens = {stream.context_tokens}\nsync_tokens = {stream.sync_tokens}")
