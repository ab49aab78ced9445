"""How much of what people wrote an answer holds: exact match and token F1 as SQuAD has them, and ROUGE-L.

Normalisation is that of the SQuAD evaluation (arXiv 1606.05250). ROUGE-L is the package rouge-score's, with stemming.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from absorber.errors import MissingExtraError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, else 0.0."""
    return float(any(normalized(answer) == normalized(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's words, against the reference that fits best."""
    return max(_f1(normalized(answer).split(), normalized(reference).split()) for reference in references)


def _f1(own: Sequence[str], reference: Sequence[str]) -> float:
    if not own or not reference:
        return float(own == reference)
    shared = sum((Counter(own) & Counter(reference)).values())
    return 2 * shared / (len(own) + len(reference))


@cache
def rouge_l() -> Callable[[str, Sequence[str]], float]:
    """Return the function that gives the F-measure of ROUGE-L against the reference that fits best.

    Raises:
        MissingExtraError: If the package rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("ROUGE needs rouge-score: pip install 'absorber[bench]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def score(answer: str, references: Sequence[str]) -> float:
        return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)

    return score
