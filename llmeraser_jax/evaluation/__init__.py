"""Comparing the unlearned model with retraining: task metrics, forgetting metrics, gap closure, reports.

Named by module: `evaluation.tofu` (truth ratio, forget quality, model utility), `evaluation.klom`,
`evaluation.robustness` (rounding, relearning), `evaluation.overview` (`llmeraser report`).
"""

from llmeraser_jax.evaluation.closure import Closure as Closure
from llmeraser_jax.evaluation.closure import gap_closure as gap_closure
from llmeraser_jax.evaluation.closure import kl_gap_closure as kl_gap_closure
from llmeraser_jax.evaluation.extraction import extraction_strengths as extraction_strengths
from llmeraser_jax.evaluation.forgetting import HeldOutKL as HeldOutKL
from llmeraser_jax.evaluation.forgetting import HeldOutKLResult as HeldOutKLResult
from llmeraser_jax.evaluation.forgetting import heldout_kl as heldout_kl
from llmeraser_jax.evaluation.klom import Klom as Klom
from llmeraser_jax.evaluation.klom import response_margins as response_margins
from llmeraser_jax.evaluation.membership import membership_auc as membership_auc
from llmeraser_jax.evaluation.membership import membership_loss_auc as membership_loss_auc
from llmeraser_jax.evaluation.membership import membership_min_k_auc as membership_min_k_auc
from llmeraser_jax.evaluation.membership import min_k_plus_plus_scores as min_k_plus_plus_scores
from llmeraser_jax.evaluation.membership import min_k_scores as min_k_scores
from llmeraser_jax.evaluation.membership import reference_scores as reference_scores
from llmeraser_jax.evaluation.report import Comparison as Comparison
from llmeraser_jax.evaluation.report import Cost as Cost
from llmeraser_jax.evaluation.report import ModelScores as ModelScores
from llmeraser_jax.evaluation.report import SolverTrace as SolverTrace
from llmeraser_jax.evaluation.report import build_report as build_report
from llmeraser_jax.evaluation.report import render_report as render_report
from llmeraser_jax.evaluation.report import write_report as write_report
from llmeraser_jax.evaluation.tasks import Metric as Metric
from llmeraser_jax.evaluation.tasks import SeedMetric as SeedMetric
from llmeraser_jax.evaluation.tasks import auc_metric as auc_metric
from llmeraser_jax.evaluation.tasks import count_metric as count_metric
from llmeraser_jax.evaluation.tasks import exact_match as exact_match
from llmeraser_jax.evaluation.tasks import hit_ratio as hit_ratio
from llmeraser_jax.evaluation.tasks import hit_ratio_of_valid as hit_ratio_of_valid
from llmeraser_jax.evaluation.tasks import make_choice_parser as make_choice_parser
from llmeraser_jax.evaluation.tasks import over_seeds as over_seeds
from llmeraser_jax.evaluation.tasks import parse_text as parse_text
from llmeraser_jax.evaluation.tasks import yes_no_accuracy as yes_no_accuracy
from llmeraser_jax.evaluation.tasks import yes_no_auc as yes_no_auc
