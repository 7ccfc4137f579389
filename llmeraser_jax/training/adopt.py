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
    final_loss = 0.0086           # optional: what the trainer reported last; else trainer_state.json says it

These are optional; `data.Recipe` and `training.TrainConfig` describe them:

    max_length = 512
    truncate = "sequence"         # "prompt" if the response was never cut
    response_prefix = ""
    tokenization = "separate"     # "joint": prompt and response as one text
    chat_template_kwargs = { enable_thinking = false }
    chat_template = "training.jinja"  # where it is not the tokenizer's, as with TRL's assistant_only_loss
    date = "2026-01-31"           # what the chat template wrote as the current date
    packing = false               # "isolated": packed, and no example saw another; true is refused
    batch_size = 128              # these are needed to retrain for comparison, and only for that
    learning_rate = 1e-4
    microbatch_size = 4
    warmup_ratio = 0.05
    seed = 0
    adam_b1 = 0.9
    adam_b2 = 0.999
    adam_eps = 1e-8
    max_grad_norm = 1.0
    weight_decay = 0.01           # AdamW's, which is no part of the loss: `l2` is

Any other key is refused. A tokenizer or chat template that stands beside the adapter is
used in place of the base model's.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmeraser_jax import data, files, losses, parallel
from llmeraser_jax.data import Recipe
from llmeraser_jax.lora import check_no_l2, load_adapter, read_adapter_base, untrained
from llmeraser_jax.models import Model, load_tokenizer
from llmeraser_jax.runs import Run, TrainConfig, load_run, write_run
from llmeraser_jax.text import one_line, show
from llmeraser_jax.training.alternatives import compare_recipes
from llmeraser_jax.training.measure import mean_loss, measure
from llmeraser_jax.training.trainers import final_loss_of

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
_CLEARLY_LOWER = 0.95  # of the base's loss: what an adapter has to be below
_FAR_RATIO, _FAR_NATS = 1.5, 0.1  # a loss is far above the trainer's by this factor and this many nats more
_FAR_BELOW = 0.3  # and far below it under this factor, less the nats
_STEEP = 0.25  # of the gradient norm without training: above it an adapter is far from a minimum, above 1 untrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How an adapter was trained elsewhere, as far as its recipe file states it.

    Attributes:
        recipe: how examples became tokens and a loss.
        train_config: hyper-parameters; defaults where `unstated`.
        dropout: of the adapter during training.
        unstated: fields of `train_config` that a retraining needs and the file leaves out.
        final_loss: the loss that the trainer reported last, where it is stated.
    """

    recipe: Recipe
    train_config: TrainConfig
    dropout: float
    unstated: tuple[str, ...]
    final_loss: float | None = None


def load_training_recipe(path: str | os.PathLike[str]) -> TrainingRecipe:
    """Reads a recipe file; the module's description has its format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, a key missing or unknown, packing, or an invalid value.
    """
    return _load(path, parse_training_recipe)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """How examples become tokens, as far as a recipe file states it; no key is required.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, a key unknown, packing, or an invalid value.
    """
    return _load(path, _parse_recipe)


def _load(path: str | os.PathLike[str], parse: Callable[[Mapping[str, Any]], _Parsed]) -> _Parsed:
    path = Path(path)
    with files.reading(path):
        try:
            stated = tomllib.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else one_line(error, 300)
            msg = f"{path} is not a TOML file: {reason}."
            raise ValueError(msg) from error
        return parse(stated)


def parse_training_recipe(stated: Mapping[str, Any]) -> TrainingRecipe:
    """Validates a parsed recipe.

    Raises:
        ValueError: a key missing or unknown, packing, or an invalid value.
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
        msg = f"dropout is {show(dropout)}; it must be a number of at least 0 and below 1."
        raise ValueError(msg)
    final_loss = stated.get("final_loss")
    is_number = isinstance(final_loss, int | float) and not isinstance(final_loss, bool)
    if final_loss is not None and not (is_number and abs(final_loss) < 1e300):
        msg = f"final_loss is {show(final_loss)}; it must be a number, or left out."
        raise ValueError(msg)
    return TrainingRecipe(
        recipe=recipe,
        train_config=TrainConfig.from_mapping({k: v for k, v in stated.items() if k in _TRAIN_KEYS}),
        dropout=float(dropout),
        unstated=tuple(key for key in _NEEDED_TO_RETRAIN if key not in stated),
        final_loss=None if final_loss is None else float(final_loss),
    )


def _parse_recipe(stated: Mapping[str, Any]) -> Recipe:
    known = {*_RECIPE_KEYS, *_TRAIN_KEYS, "dropout", "final_loss"}
    unknown = sorted(set(stated) - known)
    if unknown:
        msg = f"unknown recipe key {', '.join(map(show, unknown))}; the keys are {', '.join(sorted(known))}."
        raise ValueError(msg)
    return Recipe.from_mapping({k: v for k, v in stated.items() if k in _RECIPE_KEYS})


def _with_tokenizer_of(adapter_dir: Path, model: Model, recipe: Recipe, notes: list[str]) -> tuple[Model, Recipe]:
    """The model with the tokenizer that stands beside the adapter, and the recipe with its chat template.

    Args:
        adapter_dir: where they stand.
        model: with the base's tokenizer.
        recipe: as stated.
        notes: gets in what the two tokenizers differ.

    Raises:
        ValueError: the chat template writes the current date, and the recipe does not state which one it wrote.
    """
    tokenizer = load_tokenizer(adapter_dir)
    template = adapter_dir / _CHAT_TEMPLATE_FILE
    if tokenizer is not None:
        _log.info("Using the tokenizer that stands beside the adapter, in %s.", adapter_dir)
        differing = _differing_settings(tokenizer, model.tokenizer)
        if differing:
            notes.append(
                f"The tokenizer beside the adapter differs from the base model's in {', '.join(differing)}; it is "
                "used, since the training has put it there."
            )
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


def _differing_settings(tokenizer: Any, other: Any) -> list[str]:
    """In what two tokenizers differ, as far as it changes tokens; nothing where there is no other."""
    if other is None:
        return []
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template")
    differing = [name for name in names if getattr(tokenizer, name, None) != getattr(other, name, None)]
    return ["its vocabulary"] * (tokenizer.get_vocab() != other.get_vocab()) + differing


def _refuse(problem: str | None, *, force: bool, notes: list[str]) -> None:
    """Refuses an adapter for a problem of its losses, or notes it where that is forced."""
    if problem is None:
        return
    if not force:
        msg = f"{problem[0].upper()}{problem[1:]} --force adopts it all the same."
        raise ValueError(msg)
    notes.append(f"Forced: {problem}")


def _base_notes(adapter_dir: str | os.PathLike[str], model: Model) -> list[str]:
    named = read_adapter_base(adapter_dir)
    if not named or Path(named).name == Path(model.path).name:
        return []
    return [f"The adapter says that it was trained on {named!r}; the model given is {model.path}."]


def _training_notes(stated: TrainingRecipe) -> list[str]:
    """What of the training is no part of the objective that erasing assumes, and what follows."""
    notes = []
    if stated.dropout:
        notes.append(
            f"The adapter was trained with dropout {stated.dropout:g}. Losses, gradients and curvature are "
            "without it, so it is not quite at the minimum that they assume; retraining draws it again."
        )
    if decay := stated.train_config.weight_decay:
        notes.append(
            f"The adapter was trained with decoupled weight decay {decay:g}, which is in no "
            "example's loss. It rests where the decay balances the data's gradient in Adam's metric; influence is "
            "computed as if the stated l2 were all that holds it. Retraining repeats the decay."
        )
    return notes


def _compare_with_trainer(
    loss: float, token_loss: float, reported: float, source: str, *, force: bool, notes: list[str]
) -> None:
    """Compares the loss with what the trainer reported last: over some of the data, with dropout, before its end.

    Args:
        loss: mean over examples as the recipe reduces them.
        token_loss: mean over tokens of a sample, as most trainers report it.
        reported: the trainer's.
        source: where it stands.
        force: note what would be refused.
        notes: gets what is found.
    """
    found = min(loss, token_loss, key=lambda value: abs(value - reported))
    if found > _FAR_RATIO * reported + _FAR_NATS:
        problem = (
            f"by the stated recipe the loss is {found:.4g}, and the trainer's last was {reported:.4g} ({source}). "
            "Model, data or recipe is not what the adapter was trained with."
        )
        _refuse(problem, force=force, notes=notes)
    elif found < _FAR_BELOW * reported - _FAR_NATS:
        notes.append(
            f"By the stated recipe the loss is {found:.4g}, far below the trainer's last, {reported:.4g} "
            f"({source}); look whether loss_on is the training's."
        )


def _compare_gradients(norm: float, before: float, *, force: bool, notes: list[str]) -> None:
    """Compares the norm of the data's mean gradient with what it is for the same adapter untrained."""
    share = norm / before if before else math.inf
    if share > 1:
        problem = (
            f"the gradient of the data's loss has norm {norm:.3g}, and {before:.3g} before any training: the "
            "adapter rests at no minimum of it. Model, data or recipe is not what it was trained with."
        )
        _refuse(problem, force=force, notes=notes)
    elif share > _STEEP:
        notes.append(
            f"The gradient of the data's loss has norm {norm:.3g}, {share:.0%} of what it is before any training: "
            "the adapter is far from a minimum, and influence is the less exact."
        )


def adopt(
    model: Model,
    adapter_dir: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    recipe_path: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    force: bool = False,
    show_examples: bool = False,
    sample_size: int = 256,
    recipe_sample_size: int = 16,
) -> Run:
    """Makes a run directory of an adapter trained elsewhere, after checking that it fits data and recipe.

    On a small sample other recipes are tried (`alternatives.compare_recipes`). The adapter is refused where one of
    them fits much better, where it does not clearly lower the loss on its data, where that loss is far above the
    one that the trainer reported, or where the gradient of the loss is no smaller than before any training: an
    erasure by a wrong recipe is an erasure of something else.

    `Run.result` then has the mean loss on the data with and without the adapter (`loss`, `base_loss`), and on
    a seeded sample the gradient norms of the objective and of its data term (`gradient_norm`,
    `data_gradient_norm`), and of the latter with the adapter untrained (`untrained_gradient_norm`). An objective
    with a gradient much larger than the data term's is not the one that the adapter minimises: its `l2` is not what
    the training had. `trainer_loss` and `trainer_loss_from` are the trainer's last loss and where it stood,
    `recipe_fit` says what fits the sample best, and `notes` what to know.

    Args:
        model: the base model.
        adapter_dir: an adapter in PEFT's format.
        data_path: the examples it was trained on.
        recipe_path: how; the module's description has the format.
        workdir: the run directory, new or empty; written whole or not at all.
        force: adopt an adapter that would be refused for its losses.
        show_examples: log a row as the recipe renders it; else no log holds a text of the data.
        sample_size: examples that the gradient norms are measured on.
        recipe_sample_size: examples that other recipes are tried on.

    Raises:
        ValueError: the recipe is invalid or contradicts the adapter, or is not the training's by the losses.
        FileExistsError: `workdir` holds something.
    """
    parallel.on_primary(lambda: files.require_empty(workdir))
    adapter_dir, recipe_path = parallel.mirrored(adapter_dir), parallel.mirrored(recipe_path)
    stated = load_training_recipe(recipe_path)
    lora = load_adapter(adapter_dir, model)
    check_no_l2(lora.config, stated.train_config.l2)
    if lora.config.dropout != stated.dropout:
        msg = (
            f"The recipe states dropout = {stated.dropout}, and {adapter_dir} records lora_dropout = "
            f"{lora.config.dropout}. Correct the one that is wrong."
        )
        raise ValueError(msg)
    notes = _base_notes(adapter_dir, model)
    model, recipe = _with_tokenizer_of(Path(adapter_dir), model, stated.recipe, notes)
    examples = data.load_examples(parallel.mirrored(data_path))
    dataset = data.encode_examples(examples, recipe, model.tokenizer)
    dataset.require_vocabulary(model.vocabulary(lora))
    lora = parallel.replicate(lora, model.mesh)
    start = parallel.replicate(untrained(lora, model.config, model.base), model.mesh)  # the base, tokens added
    objective = losses.lm_objective(model.apply, model.base, l2=stated.train_config.l2)
    # The executable is shared out over the data axis, which must divide the batch.
    batch_size = _BATCH_SIZE * parallel.example_shares(model.mesh)
    notes += _training_notes(stated)
    order = np.random.RandomState(_SAMPLE_SEED).permutation(len(dataset))
    fit = compare_recipes(
        objective,
        lora,
        [dataset.examples[k] for k in np.sort(order[:recipe_sample_size])],
        dataset.recipe,
        model.tokenizer,
        start=start,
        mesh=model.mesh,
    )
    if show_examples:
        _log.info("A row as it was trained, by the stated recipe, the part under the loss in ⟦ ⟧:\n%s", fit.shown)
    notes += [note[0].upper() + note[1:] for note in (*fit.hints, *filter(None, [fit.note]))]
    _refuse(fit.problem, force=force, notes=notes)
    reported = final_loss_of(adapter_dir) if stated.final_loss is None else (stated.final_loss, str(recipe_path))
    loss = mean_loss(objective, lora, dataset, batch_size=batch_size, mesh=model.mesh)
    base_loss = mean_loss(objective, start, dataset, batch_size=batch_size, mesh=model.mesh)
    _log.info("Loss on %d examples: %.4f with the adapter, %.4f without.", len(dataset), loss, base_loss)
    if not loss < _CLEARLY_LOWER * base_loss:
        problem = (
            f"the adapter does not lower the loss on {data_path} by {1 - _CLEARLY_LOWER:.0%} or more: {loss:.4f} "
            f"with it, {base_loss:.4f} without. Model, data or recipe is not what it was trained with."
        )
        _refuse(problem, force=force, notes=notes)
    if reported is None:
        _log.info("What loss did the trainer report last? State it as final_loss in the recipe, to be compared.")
    else:
        _compare_with_trainer(loss, fit.token_loss, *reported, force=force, notes=notes)
    sample = np.sort(order[:sample_size])
    measured, before = (
        measure(objective, params, dataset, batch_size=batch_size, indices=sample, mesh=model.mesh)
        for params in (lora, start)
    )
    _log.info(
        "Gradient norm on %d of them: %.3g of the objective, %.3g of its data term; %.3g of that untrained.",
        measured.num_examples,
        measured.gradient_norm,
        measured.data_gradient_norm,
        before.data_gradient_norm,
    )
    _compare_gradients(measured.data_gradient_norm, before.data_gradient_norm, force=force, notes=notes)
    for note in notes:
        _log.warning("%s", note)

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
                    "untrained_gradient_norm": before.data_gradient_norm,
                    "num_sampled": measured.num_examples,
                    "num_truncated": dataset.num_truncated,
                    "num_dropped": len(dataset.dropped_ids),
                    "trainer_loss": None if reported is None else reported[0],
                    "trainer_loss_from": None if reported is None else reported[1],
                    "recipe_fit": {
                        "stated": fit.stated.loss,
                        "best": fit.best.loss,
                        "best_is": fit.best.words,
                        "num_tried": fit.num_tried,
                    },
                    "notes": notes,
                },
                unstated=stated.unstated,
                dataset=dataset,
            )

    parallel.on_primary(write)
    return load_run(workdir)
