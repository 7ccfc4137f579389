"""Comparing models with retraining: measure -> records -> summarise -> render.

measures                     what is measured on one model; the functions behind it are named by module: `scoring`,
                             `forgetting` (held-out KL), `membership`, `extraction`, `klom`, `robustness`, `tasks`,
                             `tofu`
records                      the schema of what was measured, and of its files
summary, closure             models compared with each other
page, plots, render          what is said of them, as HTML, Markdown and on a terminal
job                          the commands `evaluate` and `report`
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
from llmeraser_jax.evaluation.records import Comparison as Comparison
from llmeraser_jax.evaluation.records import Record as Record
from llmeraser_jax.evaluation.summary import summarise as summarise
from llmeraser_jax.evaluation.tasks import Metric as Metric
from llmeraser_jax.evaluation.tasks import auc_metric as auc_metric
from llmeraser_jax.evaluation.tasks import count_metric as count_metric
from llmeraser_jax.evaluation.tasks import exact_match as exact_match
from llmeraser_jax.evaluation.tasks import hit_ratio as hit_ratio
from llmeraser_jax.evaluation.tasks import hit_ratio_of_valid as hit_ratio_of_valid
from llmeraser_jax.evaluation.tasks import make_choice_parser as make_choice_parser
from llmeraser_jax.evaluation.tasks import parse_text as parse_text
from llmeraser_jax.evaluation.tasks import yes_no_accuracy as yes_no_accuracy
from llmeraser_jax.evaluation.tasks import yes_no_auc as yes_no_auc
