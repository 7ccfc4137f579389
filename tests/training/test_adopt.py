"""Adapters trained elsewhere become runs, if model, data and recipe are what they were trained with."""

import dataclasses
import shutil
import sys
import tomllib

import jax
import numpy as np
import pytest

from llmeraser_jax import data, losses, runs, trees
from llmeraser_jax.lora import save_adapter
from llmeraser_jax.training.adopt import adopt, load_training_recipe, parse_training_recipe
from tests.training import tiny

RECIPE = {
    "template": "plain",
    "add_bos": True,
    "add_eos": True,
    "loss_on": "response",
    "reduction": "example",
    "truncation_side": "left",
    "epochs": 10,
    "l2": 0.001,
    "dropout": 0.0,
}


def write_toml(path, stated):
    def literal(value):
        return str(value).lower() if isinstance(value, bool) else repr(value)

    path.write_text("".join(f"{key} = {literal(value)}\n" for key, value in stated.items()))
    return path


def scaled(lora, share):
    """The adapter with that share of its B."""
    return jax.tree_util.tree_map_with_path(lambda path, x: share * x if path[-1].key == "b" else x, lora)


@pytest.fixture
def recipe_path(tmp_path):
    return write_toml(tmp_path / "recipe.toml", RECIPE)


def test_an_adopted_run_reports_both_losses_and_both_gradient_norms(
    tmp_path, model, data_path, finished_run, recipe_path
):
    run = adopt(model, finished_run.path / "adapter", data_path, recipe_path, tmp_path / "run")
    assert run == runs.load_run(tmp_path / "run")
    assert run.kind == "adopt" and not run.knows_initial_adapter
    lora = run.load_adapter(model)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(lora), jax.tree.leaves(finished_run.load_adapter(model)), strict=True)
    )
    # Oracle: the same quantities by one undivided sum over all examples.
    dataset = run.encode(run.load_examples(), model.tokenizer)
    n = len(dataset)
    stack = dataset.stack_uniform(np.arange(n), np.full(n, 1 / n), chunk_size=n)
    objective = losses.lm_objective(model.apply, model.base, l2=0.001)
    data_only = losses.lm_objective(model.apply, model.base, l2=0.0)
    base = losses.response_cross_entropy(
        model.apply(
            model.base, None, *(getattr(stack.batches[0], k)[0] for k in ("tokens", "attention_mask", "positions"))
        ),
        jax.tree.map(lambda leaf: leaf[0], stack.batches[0]),
    )
    expected = {
        "loss": losses.loss_sum(objective, lora, stack),
        "base_loss": np.mean(base),
        "gradient_norm": trees.tree_norm(losses.gradient_sum(objective, lora, stack)),
        "data_gradient_norm": trees.tree_norm(losses.gradient_sum(data_only, lora, stack)),
        "untrained_gradient_norm": trees.tree_norm(losses.gradient_sum(data_only, scaled(lora, 0.0), stack)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(run.result[name], value, rtol=1e-5)
    np.testing.assert_allclose(run.result["loss"], finished_run.result["loss"], rtol=1e-5)
    assert run.result["num_sampled"] == 10


def test_the_gradient_norms_are_measured_on_a_seeded_sample(tmp_path, model, data_path, finished_run, recipe_path):
    results = [
        adopt(model, finished_run.path / "adapter", data_path, recipe_path, tmp_path / name, sample_size=4).result
        for name in ("a", "b")
    ]
    assert results[0] == results[1] and results[0]["num_sampled"] == 4


def test_an_adapter_that_does_not_lower_the_loss_is_refused_unless_forced(
    tmp_path, model, data_path, finished_run, recipe_path, caplog
):
    # Negating A alone turns the adapter's update of every weight round.
    worse = jax.tree_util.tree_map_with_path(
        lambda path, leaf: -leaf if path[-1].key == "a" else leaf, finished_run.load_adapter(model)
    )
    save_adapter(tmp_path / "worse", worse, model)
    with pytest.raises(ValueError, match=r"does not lower the loss on .*: \d+\.\d+ with it, \d+\.\d+ without"):
        adopt(model, tmp_path / "worse", data_path, recipe_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = adopt(model, tmp_path / "worse", data_path, recipe_path, tmp_path / "run", force=True)
    assert run.result["loss"] >= run.result["base_loss"]
    assert "does not lower the loss" in caplog.text


def test_an_adapter_as_steep_as_an_untrained_one_is_refused_unless_forced(
    tmp_path, model, data_path, finished_run, recipe_path
):
    adapter = finished_run.load_adapter(model)
    for name, share in (("steep", 0.1), ("hardly trained", 0.3)):
        save_adapter(tmp_path / name, scaled(adapter, share), model)
    with pytest.raises(ValueError, match=r"has norm 5\.\d+, and 4\.\d+ before any training.* --force"):
        adopt(model, tmp_path / "steep", data_path, recipe_path, tmp_path / "run")
    run = adopt(model, tmp_path / "steep", data_path, recipe_path, tmp_path / "run", force=True)
    assert any(note.startswith("Forced: the gradient") for note in run.result["notes"])
    run = adopt(model, tmp_path / "hardly trained", data_path, recipe_path, tmp_path / "second")
    assert any("far from a minimum" in note for note in run.result["notes"])


def test_another_tokenizer_beside_the_adapter_is_noted(
    tmp_path, model, data_path, finished_run, recipe_path, caplog
):
    caplog.set_level("INFO", "llmeraser_jax")
    shutil.copytree(finished_run.path / "adapter", tmp_path / "adapter")
    tokenizer = tiny.word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "adapter")
    run = adopt(model, tmp_path / "adapter", data_path, recipe_path, tmp_path / "run")
    assert run.result["notes"] == [] and "State it as final_loss" in caplog.text
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    run = adopt(model, tmp_path / "adapter", data_path, recipe_path, tmp_path / "second")
    assert any(
        "beside the adapter differs from the base model's in chat_template" in n for n in run.result["notes"]
    )


def test_an_adapter_with_trained_copies_is_adopted_with_the_loss_of_the_base_beside_it(
    tmp_path, model, data_path, finished_run
):
    trained = finished_run.load_adapter(model)
    config = dataclasses.replace(trained.config, modules_to_save=("lm_head", "embed_tokens"))
    copies = model.init_lora(jax.random.key(0), config).params["copies"]
    lora = dataclasses.replace(trained, params={**trained.params, "copies": copies}, config=config)
    save_adapter(tmp_path / "adapter", lora, model)
    with pytest.raises(
        ValueError, match=r"l2 is 0\.001, which would pull the trained copies of lm_head, embed_tokens"
    ):
        adopt(model, tmp_path / "adapter", data_path, write_toml(tmp_path / "l2.toml", RECIPE), tmp_path / "run")
    recipe = write_toml(tmp_path / "recipe.toml", {**RECIPE, "l2": 0.0})
    run = adopt(model, tmp_path / "adapter", data_path, recipe, tmp_path / "run")
    plain = adopt(model, finished_run.path / "adapter", data_path, recipe, tmp_path / "plain")
    for name in ("loss", "base_loss"):
        np.testing.assert_allclose(run.result[name], plain.result[name], rtol=1e-5)
    assert run.result["data_gradient_norm"] > plain.result["data_gradient_norm"]  # that of the copies too


def test_an_adapter_that_changes_nothing_is_refused(tmp_path, model, data_path, recipe_path):
    save_adapter(tmp_path / "fresh", model.init_lora(jax.random.key(0), tiny.LORA), model)
    with pytest.raises(ValueError, match="does not lower the loss"):
        adopt(model, tmp_path / "fresh", data_path, recipe_path, tmp_path / "run")


def test_a_directory_with_something_in_it_is_refused_before_any_computation(
    tmp_path, model, data_path, recipe_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="mine"):
        adopt(model, tmp_path / "no adapter", data_path, recipe_path, tmp_path / "run")


def test_dropout_must_be_what_peft_recorded_and_is_then_kept(tmp_path, model, data_path, finished_run, caplog):
    lora = finished_run.load_adapter(model)
    lora = dataclasses.replace(lora, config=dataclasses.replace(lora.config, dropout=0.05))
    save_adapter(tmp_path / "adapter", lora, model)
    wrong = write_toml(tmp_path / "wrong.toml", RECIPE)
    with pytest.raises(ValueError, match=r"states dropout = 0.0, and .* records lora_dropout = 0.05"):
        adopt(model, tmp_path / "adapter", data_path, wrong, tmp_path / "run")
    right = write_toml(tmp_path / "right.toml", {**RECIPE, "dropout": 0.05})
    run = adopt(model, tmp_path / "adapter", data_path, right, tmp_path / "run")
    assert run.lora_config.dropout == 0.05
    assert "trained with dropout 0.05" in caplog.text
    assert any("trained with dropout 0.05" in note for note in run.result["notes"])
    # Gradients and losses are those of the network without dropout.
    np.testing.assert_allclose(run.result["loss"], finished_run.result["loss"], rtol=1e-5)


def test_a_recipe_states_how_examples_become_tokens(tmp_path, model, data_path, finished_run):
    path = write_toml(
        tmp_path / "recipe.toml", {**RECIPE, "add_eos": False, "reduction": "token", "loss_on": "all"}
    )
    run = adopt(model, finished_run.path / "adapter", data_path, path, tmp_path / "run", force=True)
    dataset = run.encode(run.load_examples(), model.tokenizer)
    lengths = [len(e.tokens) for e in dataset.encoded]
    assert dataset.encoded[0].tokens[-1] != model.tokenizer.eos_token_id
    assert run.normalizer == np.mean([length - 1 for length in lengths])
    assert run.recipe.loss_on == "all" and run.recipe.add_eos is False


def test_what_a_retraining_needs_and_the_recipe_leaves_out_is_remembered():
    assert parse_training_recipe(RECIPE).unstated == ("batch_size", "learning_rate", "seed")
    stated = parse_training_recipe(
        {**RECIPE, "batch_size": 4, "learning_rate": 0.1, "seed": 7, "max_grad_norm": 1.0}
    )
    assert stated.unstated == ()
    config = stated.train_config
    assert (config.batch_size, config.learning_rate, config.seed, config.max_grad_norm) == (4, 0.1, 7, 1.0)
    assert (config.epochs, config.l2) == (10, 0.001)


def test_decoupled_decay_is_accepted_with_its_effect_stated(tmp_path, model, data_path, finished_run):
    for decay, words in ((0.0, []), (0.01, ["decoupled weight decay 0.01"])):
        path = write_toml(tmp_path / f"{decay}.toml", {**RECIPE, "weight_decay": decay})
        run = adopt(model, finished_run.path / "adapter", data_path, path, tmp_path / f"run {decay}")
        assert run.train_config.weight_decay == decay
        assert len(run.result["notes"]) == len(words)
        assert all(word in note for word, note in zip(words, run.result["notes"], strict=True))


@pytest.mark.parametrize("key", sorted(RECIPE))
def test_every_required_key_is_missed_by_name(key):
    stated = {k: v for k, v in RECIPE.items() if k != key}
    with pytest.raises(ValueError, match=f"does not state {key};"):
        parse_training_recipe(stated)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"packing": True}, "packing is true, which is not supported"),
        ({"weight_decay": -0.01}, "weight_decay is -0.01"),
        ({"lr_scheduler": "linear"}, "unknown recipe key 'lr_scheduler'"),
        ({"checkpoint_every_steps": 3}, "unknown recipe key 'checkpoint_every_steps'"),
        ({"template": "auto"}, "template is 'auto', which is a guess"),
        ({"reduction": "batch"}, "reduction is 'batch'"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"l2": -1.0}, "l2 is -1.0"),
    ],
)
def test_a_recipe_with_a_wrong_entry_is_refused_by_name(tmp_path, stated, expected):
    path = write_toml(tmp_path / "recipe.toml", {**RECIPE, **stated})
    with pytest.raises(ValueError, match=f"recipe.toml: {expected}"):
        load_training_recipe(path)


def test_a_recipe_that_is_not_toml_is_named(tmp_path):
    (tmp_path / "recipe.toml").write_text("template: alpaca\n")
    with pytest.raises(ValueError, match=r"recipe\.toml is not a TOML file"):
        load_training_recipe(tmp_path / "recipe.toml")


def test_the_example_in_the_documentation_is_a_valid_recipe():
    """Both blocks of the module's description, joined."""
    text = sys.modules["llmeraser_jax.training.adopt"].__doc__ or ""
    block = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    stated = parse_training_recipe(tomllib.loads(block))
    assert stated.unstated == () and stated.train_config.batch_size == 128


def test_an_adopted_run_is_verified_like_any_other(tmp_path, model, data_path, finished_run, recipe_path):
    copy = shutil.copy(data_path, tmp_path / "train.jsonl")
    run = adopt(model, finished_run.path / "adapter", copy, recipe_path, tmp_path / "run")
    tiny.write_rows(tmp_path / "train.jsonl", [*tiny.rows()[:9], {**tiny.rows()[9], "output": "now"}])
    with pytest.raises(runs.RunError, match="1 changed: 'r9'"):
        run.load_examples()
    assert data.load_examples(data_path) == run.load_examples(data_path)
