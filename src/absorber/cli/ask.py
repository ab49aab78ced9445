"""`absorber ask`: a question to a memory."""

import time
from pathlib import Path
from typing import Literal

from absorber.cli.console import Output
from absorber.cli.opening import open_memory, open_model
from absorber.cli.options import JsonFlag, ModelFlag, SourceArgument
from absorber.cli.source import read_question


def ask(
    folder: Path,
    question: SourceArgument,
    /,
    *,
    model: ModelFlag = None,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    gate: Literal["off", "entropy", "likelihood"] | None = None,
    compare: bool = False,
    json: JsonFlag = False,
) -> int:
    """Ask a memory, or a session, which also reads its window; neither is changed.

    Args:
        folder: What `absorber absorb --output` or `absorber stream --session` wrote.
        question: Any text, or - for standard input.
        model: The model it was absorbed with; found by itself if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: Type of the model's weights: auto, float32, bfloat16, float16.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of sampling.
        gate: Answer without the memory if it makes the answer's first token more uncertain (entropy), or the question
            less likely (likelihood), or never (off); the memory's own setting if left out.
        compare: Answer without the memory as well.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    words = read_question(question)
    from absorber.saved_session import saved_base
    from absorber.session import Session

    base = saved_base(folder)
    loaded = open_model(model or base, report, device=device, dtype=dtype)
    session = open_memory(folder, *loaded)

    def answer(asked: Session) -> str:
        return asked.ask(words, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, gate=gate)

    started = time.monotonic()
    with_memory = answer(session)
    seconds = round(time.monotonic() - started, 3)
    facts = {"question": words, "answer": with_memory, "seconds": seconds}
    if not compare:
        report.show(with_memory)
    else:
        without = answer(Session(*loaded, session.memory.config, session.memory.stream))
        facts["answer_without_memory"] = without
        report.show(f"with memory:    {with_memory}\n\nwithout memory: {without}")
    report.event("done", **facts)
    return 0
