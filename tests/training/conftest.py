"""A tiny model, its data, and one finished run of it, shared by the tests that only read them."""

import pytest

from llmeraser_jax.models import load_model
from llmeraser_jax.training.job import finetune_run
from tests.training import tiny


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return tiny.save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def model(model_path):
    return load_model(model_path)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.rows())


@pytest.fixture(scope="session")
def finished_run(model, data_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return finetune_run(model, data_path, workdir, recipe=tiny.RECIPE, lora=tiny.LORA, config=tiny.CONFIG)
