"""Owns the adoption of adapters trained elsewhere: PEFT directory, data and recipe become a run directory.

The recipe is a TOML file that states how the adapter was trained. These keys are required, because a wrong
guess of any of them makes another objective and so a wrong erasure:

    template = "alpaca"           # "tallrec", "none", "plain", "qa", "chat", or a format string with {instruction}
                                  # and {input}; TRL's prompt/completion texts and text rows are "none"
    add_bos = true                # the sequence began with BOS; may be left out for "chat"
    add_eos = true                # the response ended with EOS, under the loss; may be left out for "chat"
    loss_on = "response"          # the last turn; "assistant": all assistant turns; "all": the prompt too
    reduction = "example"         # mean over each example's tokens; "token": over the tokens of the batch
    truncation_side = "left"      # TRL's keep_end; "right": its keep_start; "error" if nothing was cut
    epochs = 3
    l2 = 0.0                      # lambda of (lambda / 2) ||theta||^2 in the loss, not decoupled decay
    dropout = 0.0                 # of the adapter; what PEFT recorded must agree

These are optional; `data.Recipe` and `training.TrainConfig` describe them:

    max_length = 512
    truncate = "sequence"         # "prompt" if the response was never cut
    response_prefix = ""
    tokenization = "separate"     # "joint": prompt and response as one text
    chat_template_kwargs = { enable_thinking = false }
    chat_template = "training.jinja"  # where it is not the tokenizer's, as with TRL's assistant_only_loss
    date = "2026-01-31"           # what the chat template wrote as the current date
    packing = false               # true is refused: packed examples cannot be told apart
    batch_size = 128              # these are needed to retrain for comparison, and only for that
    learning_rate = 1e-4
    microbatch_size = 4
    warmup_ratio = 0.05
    seed = 0
    adam_b1 = 0.9
    adam_b2 = 0.999
    adam_eps = 1e-8
    max_grad_norm = 1.0

Any other key is refused, `weight_decay` by name. A tokenizer or chat template that stands beside the adapter is
used in place of the base model's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmeraser_jax import data, files, losses, parallel, trees
from llmeraser_jax.data import Recipe
from llmeraser_jax.lora import load_adapter
from llmeraser_jax.models import Model, load_tokenizer
from llmeraser_jax.runs import Run, TrainConfig, load_run, refuse_weight_decay, write_run
from llmeraser_jax.training.measure import mean_loss, measure

_log = logging.getLogger(__name__)

REQUIRED_KEYS = (
    "template",
    "add_bos",
    "add_eos",
    "loss_on",
    "reduction",
    "truncation_side",
    "epochs",
    "l2",
    "dropout",
)
_KEYS_OF_A_CHAT_TEMPLATE = ("add_bos", "add_eos")  # it writes both itself
_RECIPE_KEYS = tuple(field.name for field in dataclasses.fields(Recipe))
_TRAIN_KEYS = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name != "checkpoint_every_steps")
# Not knowing these hinders a retraining for comparison; the rest of what is left out has a customary value.
_NEEDED_TO_RETRAIN = ("batch_size", "learning_rate", "seed")
_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_BATCH_SIZE = 8
_Parsed = TypeVar("_Parsed")
_SAMPLE_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How an adapter was trained elsewhere, as far as its recipe file states it.

    Attributes:
        recipe: how examples became tokens and a loss.
        train_config: hyper-parameters; defaults where `unstated`.
        dropout: of the adapter during training.
        unstated: fields of `train_config` that a retraining needs and the file leaves out.
    """

    recipe: Recipe
    train_config: TrainConfig
    dropout: float
    unstated: tuple[str, ...]


def load_training_recipe(path: str | os.PathLike[str]) -> TrainingRecipe:
    """Reads a recipe file; the module's description has its format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, a key missing or unknown, packing, weight decay, or an invalid value.
    """
    return _load(path, parse_training_recipe)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """How examples become tokens, as far as a recipe file states it; no key is required.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, a key unknown, packing, weight decay, or an invalid value.
    """
    return _load(path, _parse_recipe)


def _load(path: str | os.PathLike[str], parse: Callable[[Mapping[str, Any]], _Parsed]) -> _Parsed:
    path = Path(path)
    try:
        stated = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is not a TOML file: {error}."
        raise ValueError(msg) from error
    try:
        return parse(stated)
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def parse_training_recipe(stated: Mapping[str, Any]) -> TrainingRecipe:
    """Validates a parsed recipe.

    Raises:
        ValueError: a key missing or unknown, packing, weight decay, or an invalid value.
    """
    recipe = _parse_recipe(stated)
    optional = _KEYS_OF_A_CHAT_TEMPLATE if recipe.template == "chat" else ()
    missing = [key for key in REQUIRED_KEYS if key not in stated and key not in optional]
    if missing:
        msg = f"the recipe does not state {', '.join(missing)}; state how the adapter was trained."
        raise ValueError(msg)
    if recipe.template == "auto":
        msg = "template is 'auto', which is a guess; state the template that the adapter was trained with."
        raise ValueError(msg)
    dropout = stated["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        msg = f"dropout is {dropout!r}; it must be a number of at least 0 and below 1."
        raise ValueError(msg)
    return TrainingRecipe(
        recipe=recipe,
        train_config=TrainConfig.from_mapping({k: v for k, v in stated.items() if k in _TRAIN_KEYS}),
        dropout=float(dropout),
        unstated=tuple(key for key in _NEEDED_TO_RETRAIN if key not in stated),
    )


def _parse_recipe(stated: Mapping[str, Any]) -> Recipe:
    refuse_weight_decay(stated)
    known = {*_RECIPE_KEYS, *_TRAIN_KEYS, "dropout"}
    unknown = sorted(set(stated) - known)
    if unknown:
        msg = f"unknown recipe key {', '.join(map(repr, unknown))}; the keys are {', '.join(sorted(known))}."
        raise ValueError(msg)
    return Recipe.from_mapping({k: v for k, v in stated.items() if k in _RECIPE_KEYS})


def _with_tokenizer_of(adapter_dir: Path, model: Model, recipe: Recipe) -> tuple[Model, Recipe]:
    """The model with the tokenizer that stands beside the adapter, and the recipe with its chat template.

    Raises:
        ValueError: the chat template writes the current date, and the recipe does not state which one it wrote.
    """
    tokenizer = load_tokenizer(adapter_dir)
    template = adapter_dir / _CHAT_TEMPLATE_FILE
    if tokenizer is not None:
        _log.info("Using the tokenizer that stands beside the adapter, in %s.", adapter_dir)
        model = dataclasses.replace(model, tokenizer=tokenizer)
    elif template.exists() and recipe.template == "chat" and recipe.chat_template is None:
        _log.info("Using the chat template that stands beside the adapter, %s.", template)
        recipe = dataclasses.replace(recipe, chat_template=template.read_text(encoding="utf-8"))
    if recipe.template == "chat" and recipe.date is None and recipe.asks_for_date(model.tokenizer):
        msg = (
            "the chat template writes the current date, and the recipe does not state the one it wrote in "
            'training; add date = "YYYY-MM-DD".'
        )
        raise ValueError(msg)
    return model, recipe


def adopt(
    model: Model,
    adapter_dir: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    recipe_path: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    force: bool = False,
    sample_size: int = 256,
) -> Run:
    """Makes a run directory of an adapter trained elsewhere, after checking that it fits data and recipe.

    `Run.result` then has the mean loss on the data with and without the adapter (`loss`, `base_loss`), and on
    a seeded sample the gradient norms of the objective and of its data term (`gradient_norm`,
    `data_gradient_norm`). An objective with a gradient much larger than the data term's is not the one that
    the adapter minimises: its `l2` is not what the training had.

    Args:
        model: the base model.
        adapter_dir: an adapter in PEFT's format.
        data_path: the examples it was trained on.
        recipe_path: how; the module's description has the format.
        workdir: the run directory, new or empty; written whole or not at all.
        force: adopt an adapter that does not lower the loss on its data.
        sample_size: examples that the gradient norms are measured on.

    Raises:
        ValueError: the recipe is invalid or contradicts the adapter, or the adapter does not lower the loss.
        FileExistsError: `workdir` holds something.
    """
    files.require_empty(workdir)
    stated = load_training_recipe(recipe_path)
    lora = load_adapter(adapter_dir, model)
    if lora.config.dropout != stated.dropout:
        msg = (
            f"The recipe states dropout = {stated.dropout}, and {adapter_dir} records lora_dropout = "
            f"{lora.config.dropout}. Correct the one that is wrong."
        )
        raise ValueError(msg)
    if stated.dropout:
        _log.warning(
            "The adapter was trained with dropout %g; gradients and curvature are computed without it, so it "
            "is not quite at the minimum that they assume.",
            stated.dropout,
        )
    model, recipe = _with_tokenizer_of(Path(adapter_dir), model, stated.recipe)
    examples = data.load_examples(data_path)
    dataset = data.encode_examples(examples, recipe, model.tokenizer)
    lora = parallel.replicate(lora, model.mesh)
    objective = losses.lm_objective(model.apply, model.base, l2=stated.train_config.l2)
    # The executable is shared out over the data axis, which must divide the batch.
    batch_size = _BATCH_SIZE if model.mesh is None else _BATCH_SIZE * model.mesh.shape["data"]
    loss = mean_loss(objective, lora, dataset, batch_size=batch_size, mesh=model.mesh)
    no_adapter = trees.tree_zeros_like(lora)
    base_loss = mean_loss(objective, no_adapter, dataset, batch_size=batch_size, mesh=model.mesh)
    _log.info("Loss on %d examples: %.4f with the adapter, %.4f without.", len(dataset), loss, base_loss)
    if not loss < base_loss:
        msg = (
            f"The adapter does not lower the loss on {data_path}: {loss:.4f} with it, {base_loss:.4f} "
            "without. Model, data or recipe is not what it was trained with; force adopts it all the same."
        )
        if not force:
            raise ValueError(msg)
        _log.warning("%s", msg)
    chosen = np.random.RandomState(_SAMPLE_SEED).permutation(len(dataset))[:sample_size]
    measured = measure(objective, lora, dataset, batch_size=batch_size, indices=np.sort(chosen), mesh=model.mesh)
    _log.info(
        "Gradient norm on %d of them: %.3g of the objective, %.3g of its data term.",
        measured.num_examples,
        measured.gradient_norm,
        measured.data_gradient_norm,
    )

    def write() -> None:
        with files.atomic_directory(workdir) as directory:
            write_run(
                directory,
                kind="adopt",
                model=model,
                recipe=dataset.recipe,
                normalizer=dataset.normalizer,
                train_config=stated.train_config,
                examples=examples,
                data_path=data_path,
                lora=lora,
                initial_lora=None,
                result={
                    "loss": loss,
                    "base_loss": base_loss,
                    "gradient_norm": measured.gradient_norm,
                    "data_gradient_norm": measured.data_gradient_norm,
                    "num_sampled": measured.num_examples,
                    "num_truncated": dataset.num_truncated,
                    "num_dropped": len(dataset.dropped_ids),
                },
                unstated=stated.unstated,
                dataset=dataset,
            )

    parallel.on_primary(write)
    return load_run(workdir)
