"""`absorber eval`: lm-evaluation-harness with Absorber as a model."""

import sys
from typing import Annotated

from cyclopts import Parameter

from absorber.errors import MissingExtraError


def evaluate(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run lm-evaluation-harness with a model that absorbs what its window does not hold.

    It is the command lm_eval with one model type more, absorber, which is also the one that is used if none is named:

        absorber eval --tasks lambada_openai --model_args pretrained=MODEL,window=1536,memory=FOLDER

    With a memory and without, the same task says what the memory costs elsewhere. What the harness says of itself:
    absorber eval -- run --help.

    Args:
        arguments: Those of lm_eval. Of --model_args there are pretrained, memory, window, config (a TOML file with
            tables [absorb] and [stream]), device, dtype, quantization, and those of the model type hf.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise MissingExtraError("absorber eval needs lm-evaluation-harness: pip install 'absorber[eval]'") from error
    from absorber.bench import harness  # noqa: F401  (which registers the model type)

    given = list(arguments)
    if given and given[0] not in ("run", "ls", "validate"):
        given.insert(0, "run")
    named = {argument.split("=")[0] for argument in given}
    if given[:1] == ["run"] and not named & {"--model", "-M", "--help", "-h", "--config", "-C"}:
        given += ["--model", "absorber"]
    before = sys.argv
    sys.argv = ["absorber eval", *given]
    try:
        cli_evaluate()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = before
    return 0
