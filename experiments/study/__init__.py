"""The comparison that the recommendation and question-answer experiments share; no experiment of its own."""

from experiments.study.options import METHODS, StudyOptions, check_methods
from experiments.study.show import set_up_logging, show
from experiments.study.study import LEARNING_RATES, Encode, Nearest, NotYetError, Scenario, Study, run_study

__all__ = [
    "LEARNING_RATES",
    "METHODS",
    "Encode",
    "Nearest",
    "NotYetError",
    "Scenario",
    "Study",
    "StudyOptions",
    "check_methods",
    "run_study",
    "set_up_logging",
    "show",
]
