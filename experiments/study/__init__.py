"""The comparison that the recommendation and question-answer experiments share; no experiment of its own."""

from experiments.study.options import METHODS, StudyOptions, check_methods
from experiments.study.show import set_up_logging, show
from experiments.study.study import (
    LEARNING_RATES,
    Encode,
    Scenario,
    Study,
    held_out_task,
    metrics_as_json,
    run_study,
)

__all__ = [
    "LEARNING_RATES",
    "METHODS",
    "Encode",
    "Scenario",
    "Study",
    "StudyOptions",
    "check_methods",
    "held_out_task",
    "metrics_as_json",
    "run_study",
    "set_up_logging",
    "show",
]
