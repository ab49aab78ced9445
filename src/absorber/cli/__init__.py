"""The command line: `absorber COMMAND ...`, one file per command.

No module here imports torch at its head, so that `--help` is quick.
"""

import sys
import warnings
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from absorber.cli.absorb import absorb
from absorber.cli.ask import ask
from absorber.cli.chat import chat
from absorber.cli.console import Output
from absorber.cli.doctor import doctor
from absorber.cli.plan import plan
from absorber.cli.stream import stream
from absorber.errors import AbsorberError
from absorber.version import __version__

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

app = App(
    name="absorber",
    help="Endless memory at constant cost for any open-weights language model.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(allow_repeating=True),  # the last counts, for scripts that add flags
)
for _command in (absorb, ask, stream, chat, doctor, plan):
    app.command(_command)
app.command("absorber.cli.bench:app", name="bench", help="Measure methods against each other.")
app.command("absorber.cli.report:report", name="report", help="Make one page from the records of benchmarks.")
app.command("absorber.cli.evaluate:evaluate", name="eval", help="Run lm-evaluation-harness with Absorber as a model.")
app.command("absorber.cli.demo:demo", name="demo", help="Absorb a book that comes with Absorber, and measure it.")


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of other libraries, which are no news for whoever runs a command
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 for bad input or an error with a name, 130 after Ctrl-C.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    output = Output(json_lines="--json" in options)
    try:
        return app(list(arguments), exit_on_error=False, print_error=False) or 0
    except AbsorberError as error:
        output.fail(type(error).__name__, str(error))
        return EXIT_BAD_INPUT
    except CycloptsError as error:
        output.fail("UsageError", f"{_usage(error)} See: absorber --help")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        output.interrupted("nothing was written")
        return EXIT_INTERRUPTED


def _usage(error: CycloptsError) -> str:
    try:
        return str(error).strip()
    except ImportError as missing:  # the message lists all commands, the lazy ones as well
        return f"unknown command ({missing})."
