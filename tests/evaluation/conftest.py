"""The tiny model and its finished run, shared with the tests of training."""

from tests.training.conftest import data_path as data_path
from tests.training.conftest import finished_run as finished_run
from tests.training.conftest import model as model
from tests.training.conftest import model_path as model_path
