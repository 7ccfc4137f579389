"""A finished tiny run and a request of every kind on it, shared by the tests that only read them."""

import pytest

from llmeraser_jax import data
from llmeraser_jax.unlearning import task_of_run
from tests.training.conftest import data_path, finished_run, model, model_path  # noqa: F401

MIXED = (
    {"id": "r1", "action": "remove"},
    {"id": "r4", "action": "correct_response", "response": "grey"},
    {"id": "r6", "action": "modify_query", "instruction": "colour of s11"},
)


@pytest.fixture(scope="session")
def task(finished_run, model):  # noqa: F811
    """The run with one removal, one correction and one modified query."""
    requests = data.parse_requests(MIXED, finished_run.load_examples())
    return task_of_run(finished_run, requests, model=model)
