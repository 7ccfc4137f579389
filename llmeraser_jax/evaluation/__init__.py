"""Comparing models with retraining: measure -> records -> summarise -> render.

measures                     what is measured on one model; the functions behind it are named by module: `scoring`,
                             `forgetting` (held-out KL), `membership`, `extraction`, `klom`, `robustness`, `tasks`,
                             `tofu`
records                      the schema of what was measured, and of its files
summary, closure             models compared with each other
page, plots, render          what is said of them, as HTML, Markdown and on a terminal
job                          the commands `evaluate` and `report`
"""

from llmeraser_jax.evaluation.closure import gap_closure as gap_closure
from llmeraser_jax.evaluation.records import Comparison as Comparison
from llmeraser_jax.evaluation.records import Record as Record
from llmeraser_jax.evaluation.summary import summarise as summarise
