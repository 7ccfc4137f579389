"""What an attacker with many models tells: whether a row was unlearned, and whether anything was.

Both attacks see several unlearned models, each edited from a model trained with a seed of its own, and as many
retrained ones. A perfect way to unlearn leaves them no more than chance.

* By row, U-LiRA (Hayes et al. 2024, arXiv 2403.01218): normal distributions are fitted to the log-odds of the row
  under unlearned and under retrained models, without the model that is asked about, and the likelier one is
  guessed. U-LiRA+ (Du et al. 2025, arXiv 2406.13348) asks about rows whose label no model would predict, since
  others are forgotten too easily; give it such rows.
* By model, a classifier on a model's outputs: ridge regression on the log-odds of many rows, its penalty chosen by
  leaving out one model of those it is fitted to, and tried on models that it was not.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from scipy import stats
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_LEAST_MODELS = 4  # on either side: three are left to fit a distribution to
_LEAST_SPREAD = 1e-6  # of log-odds
_FOLDS = 8
_PENALTIES = np.logspace(-3, 3, 13)
_SHUFFLES = 40
_CHANCE_QUANTILE = 0.95

Unlearned: TypeAlias = Float[np.ndarray, "unlearned rows"]
Retrained: TypeAlias = Float[np.ndarray, "retrained rows"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """How often an attack is right.

    Attributes:
        success: balanced accuracy of each row for U-LiRA, one AUC for the classifier; 0.5 is chance.
        chance: of the same attack where labels say nothing, in 95 of 100 cases no more than this.
    """

    success: Float[np.ndarray, " rows"]
    chance: float


def _check(unlearned: Unlearned, retrained: Retrained) -> None:
    if min(len(unlearned), len(retrained)) < _LEAST_MODELS:
        msg = (
            f"{len(unlearned)} unlearned and {len(retrained)} retrained models; give at least {_LEAST_MODELS} each."
        )
        raise ValueError(msg)
    if not (np.isfinite(unlearned).all() and np.isfinite(retrained).all()):
        msg = "A log-odds is not finite; a model that diverged needs no attack."
        raise ValueError(msg)


def likelihood_ratio_attack(unlearned: Unlearned, retrained: Retrained) -> Attack:
    """U-LiRA on every row.

    Args:
        unlearned: log-odds of each row under each unlearned model (`klom.response_margins`).
        retrained: the same under each retrained model.

    Returns:
        Balanced accuracy of each row. `chance` is for the mean over the rows, by models dealt out anew.

    Raises:
        ValueError: fewer than four models on a side, other rows on either side, or log-odds that are not finite.
    """
    _check(unlearned, retrained)
    rng, both, count = np.random.default_rng(0), np.concatenate([unlearned, retrained]), len(unlearned)
    shuffled = []
    for _ in range(_SHUFFLES):
        dealt = both[rng.permutation(len(both))]
        shuffled.append(_row_accuracy(dealt[:count], dealt[count:]).mean())
    success = _row_accuracy(unlearned, retrained)
    return Attack(success=success, chance=float(np.quantile(shuffled, _CHANCE_QUANTILE)))


def _row_accuracy(unlearned: Unlearned, retrained: Retrained) -> Float[np.ndarray, " rows"]:
    rates = []
    for own, other in ((unlearned, retrained), (retrained, unlearned)):
        right = []
        for k in range(len(own)):
            left = np.delete(own, k, axis=0)
            right.append(_log_likelihood(own[k], left) > _log_likelihood(own[k], other))
        rates.append(np.mean(right, axis=0))
    return np.mean(rates, axis=0)


def _log_likelihood(
    value: Float[np.ndarray, " rows"], models: Float[np.ndarray, "models rows"]
) -> Float[np.ndarray, " rows"]:
    spread = np.maximum(models.std(axis=0, ddof=1), _LEAST_SPREAD)
    return stats.norm.logpdf(value, models.mean(axis=0), spread)


def classifier_attack(unlearned: Unlearned, retrained: Retrained) -> Attack:
    """Whether a model was unlearned at all, from its log-odds of many rows.

    Args:
        unlearned: log-odds of each row under each unlearned model.
        retrained: the same under each retrained model.

    Returns:
        The AUC of models that the classifier did not see; `chance` is with labels dealt out anew.

    Raises:
        ValueError: as `likelihood_ratio_attack`.
    """
    _check(unlearned, retrained)
    outputs = np.concatenate([unlearned, retrained])
    labels = np.repeat([1, 0], [len(unlearned), len(retrained)])
    rng = np.random.default_rng(0)
    shuffled = [_auc(outputs, rng.permutation(labels)) for _ in range(_SHUFFLES)]
    return Attack(success=np.array([_auc(outputs, labels)]), chance=float(np.quantile(shuffled, _CHANCE_QUANTILE)))


def _auc(outputs: np.ndarray, labels: np.ndarray) -> float:
    folds = StratifiedKFold(min(_FOLDS, int(np.bincount(labels).min())), shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=_PENALTIES))
    scores = cross_val_predict(model, outputs, labels, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, scores))
