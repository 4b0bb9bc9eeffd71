"""Exact scores on customers that the simulator can see: accuracy, macro-F1, AUC."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Scores:
    """One method on one split."""

    accuracy: float
    macro_f1: float
    auc: float  # mean over segments of one-against-the-rest; 0.5 knows nothing
    by_group: tuple[float, ...]  # accuracy in each group of merchants; NaN: nobody held out


def scores_of(
    labels: Int[np.ndarray, " T"],
    probabilities: Float[np.ndarray, "T S"],
    group: Int[np.ndarray, " T"],
    groups: int,
) -> Scores:
    """Score predictions; segments that do not occur among the labels are left out of the AUC."""
    from sklearn.metrics import f1_score, roc_auc_score

    predicted = probabilities.argmax(axis=1)
    hits = predicted == labels
    present = [
        segment
        for segment in range(probabilities.shape[1])
        if 0 < int((labels == segment).sum()) < len(labels)
    ]
    areas = [roc_auc_score(labels == segment, probabilities[:, segment]) for segment in present]
    return Scores(
        accuracy=float(hits.mean()),
        macro_f1=float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        auc=float(np.mean(areas)) if areas else 0.5,
        by_group=tuple(
            float(hits[group == g].mean()) if (group == g).any() else math.nan
            for g in range(groups)
        ),
    )
