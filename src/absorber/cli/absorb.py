"""`absorber absorb`: a text becomes a memory."""

import shlex
import time
from pathlib import Path
from typing import Any

from absorber.cli.console import Output, Rounds, shown_progress, spell_bytes
from absorber.cli.opening import Start, open_start, uninterrupted
from absorber.cli.options import JsonFlag, ModelFlag, Settings, SourceArgument, check_output, saved_settings
from absorber.cli.source import Source, open_source


def absorb(
    source: SourceArgument,
    memory: Path | None = None,
    /,
    *,
    output: Path,
    model: ModelFlag = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    device: str = "auto",
    json: JsonFlag = False,
) -> int:
    """Absorb a text into a memory, a folder that PEFT loads as well.

    Ctrl-C ends it and keeps what was absorbed.

    Args:
        source: A text file in UTF-8, or - for standard input.
        memory: Folder of a memory to go on from; it stays as it is.
        output: Folder to write the memory to; an older memory there is replaced at the end.
        model: Hub id, folder, .gguf file, or "tiny" (a random one for smoke tests); SmolLM2-135M-Instruct if left out.
        device: auto, cpu, cuda, cuda:1, mps.
        json: Write one JSON object per line to stdout.
    """
    report = Output(json_lines=json)
    settings.resolve()  # bad flags are the cheapest to refuse
    text = open_source(source)
    check_output(output, marker="absorber.json")
    if memory is not None:
        settings.resolve(saved_settings(memory))
    start = open_start(memory, settings, report, model=model, device=device)
    return _Absorption(report, text, output, start).run()


class _Absorption:
    def __init__(self, report: Output, text: Source, folder: Path, start: Start) -> None:
        from absorber.session import Session

        self.report, self.text, self.folder, self.start = report, text, folder, start
        self.rounds = Rounds(report)
        self.started = time.monotonic()
        session = Session(start.model, start.tokenizer, start.config, start.stream, memory=start.memory)
        self.memory = session.memory  # changed in place, so that Ctrl-C finds what was absorbed
        self.accepted_before = self.memory.num_rounds - self.memory.num_rolled_back

    def run(self) -> int:
        from absorber.absorbing import absorb

        start = self.start
        try:
            with shown_progress(self.report, self.rounds, self.text):
                absorb(
                    start.model,
                    start.tokenizer,
                    self.text.parts(),
                    start.config,
                    start.stream,
                    memory=self.memory,
                    progress=self.rounds,
                )
        except KeyboardInterrupt:
            return self._interrupted()
        self._save()
        self.report.event("done", **self._facts())
        self._show_table()
        self.rounds.warn_of_idle()
        self.report.show(f'\nnext: absorber ask {shlex.quote(str(self.folder))} "What is it about?"')
        return 0

    def _interrupted(self) -> int:
        done = self.rounds
        if self.memory.num_rounds - self.memory.num_rolled_back == self.accepted_before:
            self.report.interrupted("no round was finished, so nothing was written", saved=None, **done.facts())
            return 130
        self._save()
        self.report.interrupted(
            f"{done.accepted} round{'s' * (done.accepted > 1)} with {done.num_tokens} tokens absorbed so far, "
            f"saved to {self.folder}",
            saved=str(self.folder),
            **done.facts(),
        )
        return 130

    def _save(self) -> None:
        with uninterrupted():
            self.memory.save(self.folder)

    def _facts(self) -> dict[str, Any]:
        return {
            **self.rounds.facts(),
            "seconds": round(time.monotonic() - self.started, 3),
            "memory_bytes": sum(path.stat().st_size for path in self.folder.iterdir()),
            "folder": str(self.folder),
        }

    def _show_table(self) -> None:
        facts = self._facts()
        self.report.table(
            [
                ("tokens absorbed", f"{facts['absorbed_tokens']:,}"),
                ("rounds", f"{facts['num_rounds']} ({facts['num_rolled_back']} rolled back)"),
                ("loss", self.rounds.loss_line()),
                ("time", f"{facts['seconds']:.1f} s"),
                ("memory", spell_bytes(facts["memory_bytes"])),
                ("folder", facts["folder"]),
            ]
        )
