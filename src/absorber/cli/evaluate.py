"""`absorber eval`: lm-evaluation-harness with Absorber as a model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from absorber.cli.console import Output
from absorber.errors import MissingExtraError


def evaluate(
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
    records: Path | None = None,
    data_dir: Path | None = None,
) -> int:
    """Run lm-evaluation-harness with a model that absorbs what its window does not hold.

    It is the command lm_eval with one model type more, absorber, which is also the one that is used if none is named:

        absorber eval --tasks lambada_openai --model_args pretrained=MODEL,window=1536,memory=FOLDER

    With a memory and without, the same task says what the memory costs elsewhere. These need no hub, but a folder with
    data: absorber_drift, which are several, absorber_musique, and absorber_niah_4096 (512 to 131072). What the harness
    says of itself: absorber eval -- run --help.

    Args:
        arguments: Those of lm_eval. Of --model_args there are pretrained, memory, window, config (a TOML file with
            tables [absorb] and [stream]), device, dtype, quantization, and those of the model type hf.
        records: File of records, one JSON object a line, for absorber report; a task that it has already is not run
            again. Each task is added when it is done.
        data_dir: Folder with novels/*.txt, wikitext2/*.txt, ag_news/test.csv, trec/*.txt, banking77/*.csv,
            musique/*.jsonl, or those of them that the tasks named absorber_... need.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("absorber eval needs lm-evaluation-harness: pip install 'absorber[eval]'") from error
    from absorber.bench.harness_run import run_harness

    given = list(arguments)
    if given and given[0] not in ("run", "ls", "validate"):
        given.insert(0, "run")
    named = {argument.split("=")[0] for argument in given}
    if given[:1] == ["run"] and not named & {"--model", "-M", "--help", "-h", "--config", "-C"}:
        given += ["--model", "absorber"]
    return run_harness(given, records=records, data_dir=data_dir, say=Output(json_lines=False).say)
