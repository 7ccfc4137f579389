"""Products against outside libraries: files that curvlinops and dattri made, see `tests.golden`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax.convert import write_safetensors
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.lora import load_adapter
from llmeraser_jax.losses import lm_objective
from llmeraser_jax.models import load_model
from llmeraser_jax.types import ExampleStack, TokenBatch
from tests.curvature.problem import relative_difference
from tests.golden import files

BASE = "llama_mha_untied"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The file's problem in float64, and a reader of its vectors."""
    directory = tmp_path_factory.mktemp("golden")
    content = files.load("curvature_products")
    model = load_model(files.checkpoint(files.load(BASE), directory / "base"))

    def vector(prefix):
        where = directory / prefix
        where.mkdir()
        (where / "adapter_config.json").write_text(str(content["adapter_config"]))
        start = f"{prefix}:"
        tensors = {k[len(start) :]: v.astype(np.float32) for k, v in content.items() if k.startswith(start)}
        write_safetensors(where / "adapter_model.safetensors", tensors)
        return jax.tree.map(lambda x: x.astype(jnp.float64), load_adapter(where, model))

    with jax.enable_x64(True):
        names = ("a", "v", "gauss_newton", "fisher", "hessian", "inverse_hessian")
        base = jax.tree.map(lambda x: x.astype(jnp.float64), model.base)
        yield lm_objective(model.apply, base, l2=0.0), {name: vector(name) for name in names}, content


def mean_over_examples(content, num_targets):
    """The file's examples with the first response tokens, in micro-batches of three."""
    tokens, positions = content["tokens"], content["positions"][:num_targets]
    chunked = tokens.reshape(2, 3, -1)
    shape = (2, 3, num_targets)
    batch = TokenBatch(
        tokens=jnp.asarray(chunked, jnp.int32),
        attention_mask=jnp.ones(chunked.shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.asarray(positions, jnp.int32), shape),
        targets=jnp.asarray(chunked[..., positions + 1], jnp.int32),
        target_weights=jnp.full(shape, 1 / num_targets),
    )
    return ExampleStack((batch,), (jnp.full((2, 3), 1 / len(tokens)),))


@pytest.mark.parametrize(
    ("kind", "name", "num_targets"),
    [("gauss-newton", "gauss_newton", 3), ("empirical-fisher", "fisher", 1), ("hessian", "hessian", 3)],
)
def test_products_equal_those_of_other_libraries(golden, kind, name, num_targets):
    with jax.enable_x64(True):
        objective, vectors, content = golden
        stack = mean_over_examples(content, num_targets)
        operator = DatasetCurvature(objective, vectors["a"], stack, CURVATURES[kind])
        product = jax.jit(lambda op, v: op.mv(v))(operator, vectors["v"])
        assert relative_difference(product, vectors[name]) < 1e-5


def test_the_damped_hessian_undoes_another_library_s_inverse(golden):
    with jax.enable_x64(True):
        objective, vectors, content = golden
        hessian = DatasetCurvature(objective, vectors["a"], mean_over_examples(content, 3), CURVATURES["hessian"])
        operator = Damped(hessian, float(content["rho"]))
        solved = vectors["inverse_hessian"]
        assert relative_difference(jax.jit(lambda op, v: op.mv(v))(operator, solved), vectors["v"]) < 1e-5
