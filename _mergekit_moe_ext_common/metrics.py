"""What generated answers are measured by, from 0 to 1.

A metric is a function of the generated and the right answers, two lists of equally many strings.
"""

import importlib
import math
import re
import string
from collections.abc import Callable, Sequence

from _mergekit_moe_ext_common.errors import UserError

Metric = Callable[[Sequence[str], Sequence[str]], float]
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are the right label, letter for letter (A.1)."""
    hits = 0
    for prediction, reference in zip(predictions, references, strict=True):
        hits += prediction.strip() == reference.strip()
    return hits / len(references)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are right without case, punctuation, articles and extra spaces, as
    the official script of SQuAD normalises them.
    """
    hits = 0
    for prediction, reference in zip(predictions, references, strict=True):
        hits += _normalised(prediction) == _normalised(reference)
    return hits / len(references)


def _normalised(answer: str) -> str:
    letters = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean F-measure of ROUGE-L, without stemming, as `evaluate.load("rouge")` computes it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    total = 0.0
    for prediction, reference in zip(predictions, references, strict=True):
        total += scorer.score(reference, prediction)["rougeL"].fmeasure
    return total / len(references)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "rouge_l": rouge_l,
}


def metric_of(name: str) -> Metric:
    """A metric by its name, or one's own by `package.module:function`.

    `UserError` for a name that there is not, and for what is not installed.
    """
    if name == "rouge_l":
        try:
            importlib.import_module("rouge_score.rouge_scorer")
        except ImportError as error:
            remedy = "pip install 'mergekit-moe-ext[metrics]'"
            raise UserError(f"the metric rouge_l needs rouge-score: {remedy}") from error
    if name in METRICS:
        return METRICS[name]
    module, separator, function = name.partition(":")
    if not separator:
        known = ", ".join(METRICS)
        raise UserError(f"there is no metric {name!r}: take {known}, or package.module:function")
    try:
        metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the metric {name} cannot be imported: {error}") from error
    if not callable(metric):
        raise UserError(f"the metric {name} is no function")
    return metric


def score_of(metric: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """How good answers are by the metric of that name. `UserError` where it returns no number."""
    score = metric_of(metric)(answers, references)
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise UserError(f"the metric {metric} returns no number, but {score!r}")
    return float(score)
