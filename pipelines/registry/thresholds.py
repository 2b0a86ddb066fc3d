"""Thresholds of figures, judged by MLflow's `validate_evaluation_results`.

It knows points of metrics and no intervals, so the ends of our intervals are given to it as metrics of their own. A
figure that is missing or not a number does not pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """A bound of one figure."""

    figure: str
    bound: float
    is_least: bool
    """Whether the bound is the least value allowed, or else the most."""

    @property
    def shown(self) -> str:
        return f"at {'least' if self.is_least else 'most'} {self.bound:g}"


def unmet(figures: Mapping[str, float], thresholds: Sequence[Threshold]) -> list[Threshold]:
    """Return the thresholds that the figures do not meet."""
    from mlflow.models import EvaluationResult, MetricThreshold
    from mlflow.models.evaluation.validation import ModelValidationFailedException, validate_evaluation_results

    result, failed = EvaluationResult(metrics=dict(figures), artifacts={}), []
    for threshold in thresholds:
        bound = MetricThreshold(threshold=float(threshold.bound), greater_is_better=threshold.is_least)
        try:
            validate_evaluation_results({threshold.figure: bound}, result)
        except ModelValidationFailedException:
            failed.append(threshold)
    return failed
