"""Tasks for lm-evaluation-harness over files of one's own, so that they run without a model hub.

The YAML files beside this one are found by `absorber eval`; they name the functions of `documents` and `needles`, which
read the folder of `--data-dir`. No text is part of the package: each data set has its own licence (docs/methods.md).
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""What the harness is told to include."""
