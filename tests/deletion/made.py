"""Run directories as `finetune` and `erase` write them, of a tiny model that nothing is computed with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from llmeraser_jax import data, runs, trees
from llmeraser_jax.lora import product_norms
from llmeraser_jax.models import Model
from llmeraser_jax.unlearning import Receipt
from llmeraser_jax.unlearning.budget import Cost
from llmeraser_jax.unlearning.job import erase_run
from llmeraser_jax.unlearning.problem import EditProblem
from llmeraser_jax.unlearning.receipt import NamedExample, summarise_solves
from llmeraser_jax.unlearning.result import Result
from llmeraser_jax.unlearning.task import UnlearningTask
from llmeraser_jax.unlearning.workspace import Workspace
from tests.training import tiny

REQUESTS = (
    {"id": "r1", "action": "remove"},
    {"id": "r4", "action": "modify_query", "instruction": "colour of s11"},
    {"id": "r7", "action": "correct_response", "response": "red"},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Moves every entry of the adapter by as much, with a receipt as a method writes it."""

    by: float = 0.01
    complete: bool = True

    def run(self, task: UnlearningTask, workspace: Workspace) -> Result:
        new = jax.tree.map(lambda x: x + jnp.asarray(self.by, x.dtype), task.adapter)
        change = trees.tree_sub(new, task.adapter)
        products = product_norms(task.adapter, change)
        assert not isinstance(task.requests, EditProblem)
        named = tuple(NamedExample(id=r.id, action=str(r.action)) for r in task.requests)
        actions = [one.action for one in named]
        receipt = Receipt(
            config={"method": {"type": "Push", "by": self.by}},
            counts={action: actions.count(action) for action in ("remove", "modify_query", "correct_response")},
            named=named,
            num_examples_before=10,
            num_examples_after=9,
            method="push",
            complete=self.complete,
            validity=None,
            targets=None,
            outcome="complete",
            left=0.0,
            rhs_norm=0.0,
            solver=summarise_solves(()),
            steps=(),
            num_correctors=0,
            corrected="",
            attempts=(),
            curvature_reason="",
            step_standard_error=None,
            product_asymmetry=None,
            delta_norm=float(trees.tree_norm(change)),
            adapter_norm_before=float(trees.tree_norm(task.adapter)),
            adapter_norm_after=float(trees.tree_norm(new)),
            product_change_norm=float(products[0]),
            product_norm_before=float(products[1]),
            bf16_survival=1.0,
            edited_gradient_norm_before=1.0,
            edited_gradient_norm_after=1.0,
            gradient_norm_examples=1,
            seconds=0.0,
            peak_memory_bytes=None,
            gradient_equivalents=Cost(),
            versions={},
        )
        return Result(params=new, before=task.adapter, cost=Cost(), seconds=0.0, receipt=receipt)


def trained(path: Path, model: Model, data_path: Path) -> runs.Run:
    """A run of `finetune`, with an adapter apart from the initial one."""
    examples = data.load_examples(data_path)
    dataset = data.encode_examples(examples, tiny.RECIPE, model.tokenizer)
    initial = model.init_lora(jax.random.key(0), tiny.LORA)
    return runs.write_run(
        path,
        kind="finetune",
        model=model,
        recipe=dataset.recipe,
        normalizer=dataset.normalizer,
        train_config=tiny.CONFIG,
        examples=examples,
        data_path=data_path,
        lora=jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape) / 7, initial),
        initial_lora=initial,
        result={"loss": 0.5},
    )


def erased(run: runs.Run, path: Path, model: Model, requests=REQUESTS) -> runs.Run:
    """What `erase` makes of a run."""
    requests_path = path.with_suffix(".requests")
    requests_path.write_text("".join(json.dumps(row) + "\n" for row in requests))
    after, _ = erase_run(run, requests_path, path, Push(), model=model)
    return after
