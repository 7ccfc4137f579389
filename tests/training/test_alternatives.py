"""For adapters trained by one recipe, a comparison that starts from another finds it."""

import dataclasses
import json

import jax
import pytest

from llmeraser_jax import data, losses
from llmeraser_jax.training import finetune
from llmeraser_jax.training.adopt import adopt
from llmeraser_jax.training.alternatives import compare_recipes
from tests.training import tiny
from tests.training.test_adopt import RECIPE, write_toml

PLAIN = data.Recipe(template="plain", add_bos=True, max_length=64)
RECIPES = {
    "plain": PLAIN,
    "no bos": dataclasses.replace(PLAIN, add_bos=False),
    "no eos": dataclasses.replace(PLAIN, add_eos=False),
    "all": dataclasses.replace(PLAIN, loss_on="all"),
    "qa": dataclasses.replace(PLAIN, template="qa"),
    "alpaca": dataclasses.replace(PLAIN, template="alpaca"),
}


@pytest.fixture(scope="module")
def examples(data_path):
    return data.load_examples(data_path)


@pytest.fixture(scope="module")
def compare(model, examples):
    """`(trained by, stated) -> RecipeFit`; each adapter is trained once."""
    adapters = {}

    def run(trained, stated):
        if trained not in adapters:
            dataset = data.encode_examples(examples, RECIPES[trained], model.tokenizer)
            initial = model.init_lora(jax.random.key(1), tiny.LORA)
            config = dataclasses.replace(tiny.CONFIG, epochs=12)
            adapters[trained] = finetune(model, dataset, config, lora=initial).lora
        objective = losses.lm_objective(model.apply, model.base, l2=0.0)
        recipe = data.encode_examples(examples, RECIPES[stated], model.tokenizer).recipe
        return compare_recipes(objective, adapters[trained], examples, recipe, model.tokenizer)

    return run


@pytest.mark.parametrize("trained", ["plain", "no eos"])
def test_the_recipe_of_the_training_is_found_from_every_other(compare, trained):
    right = compare(trained, trained)
    assert right.best is right.stated and right.problem is None and right.note is None
    for stated in RECIPES:
        fit = compare(trained, stated)
        assert fit.best.recipe.template == "plain", stated
        assert (fit.best.recipe.add_bos, fit.best.recipe.add_eos) == (True, trained == "plain"), stated
        assert fit.best.loss == pytest.approx(right.stated.loss, rel=1e-5)
    assert "template 'plain' with BOS gives" in (compare("plain", "alpaca").problem or "")
    assert "without EOS gives" in (compare("no eos", "plain").problem or "")


def test_losses_are_those_of_the_rows_encoded_by_hand(compare, model, examples):
    fit = compare("plain", "plain")
    dataset = data.encode_examples(examples, PLAIN, model.tokenizer)
    lora_fit = compare("plain", "no bos")
    assert fit.stated.loss == pytest.approx(lora_fit.best.loss, rel=1e-5)
    # Every response is one word and its end: the mean over tokens is that over examples.
    assert {e.num_targets for e in dataset.encoded} == {2}
    assert fit.token_loss == pytest.approx(fit.stated.loss, rel=1e-5)
    assert fit.shown.startswith("<s> colour of s0 now⟦") and fit.shown.endswith("</s>⟧")


def test_tokens_that_were_under_the_loss_and_are_not_stated_are_hinted_at_and_the_reverse(compare):
    assert compare("all", "all").hints == () == compare("plain", "plain").hints
    assert any('loss_on "all"' in hint for hint in compare("all", "plain").hints)
    assert any('loss_on "response"' in hint for hint in compare("plain", "all").hints)
    assert any("add_eos = true" in hint for hint in compare("plain", "no eos").hints)


def test_a_wrong_template_is_refused_and_the_right_one_named(tmp_path, model, data_path, finished_run, caplog):
    caplog.set_level("INFO")
    adapter = finished_run.path / "adapter"
    wrong = write_toml(tmp_path / "wrong.toml", {**RECIPE, "template": "alpaca"})
    with pytest.raises(ValueError, match=r"Template 'plain' with BOS gives .*, the stated recipe .*did you mean"):
        adopt(model, adapter, data_path, wrong, tmp_path / "run")
    assert "</s>" not in caplog.text  # no text of the data, unless it is asked for
    with pytest.raises(ValueError, match="did you mean"):
        adopt(model, adapter, data_path, wrong, tmp_path / "run", show_examples=True)
    assert not (tmp_path / "run").exists()
    assert "⟦ red </s>⟧" in caplog.text and "<unk>" in caplog.text
    run = adopt(model, adapter, data_path, wrong, tmp_path / "run", force=True)
    assert any(note.startswith("Forced: template 'plain'") for note in run.result["notes"])
    assert run.result["recipe_fit"]["best"] < run.result["recipe_fit"]["stated"]


def test_the_trainers_loss_is_read_beside_the_adapter_or_in_the_recipe(tmp_path, model, data_path, finished_run):
    right = write_toml(tmp_path / "right.toml", RECIPE)
    adapter = tmp_path / "adapter"
    (adapter / "checkpoint-20").mkdir(parents=True)
    for path in (finished_run.path / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    loss = finished_run.result["loss"]
    for step, logged in ((9, 77.0), (20, loss + 0.01)):
        directory = adapter / f"checkpoint-{step}"
        directory.mkdir(exist_ok=True)
        state = {"log_history": [{"step": 1, "loss": 3.0}, {"step": step, "loss": logged}, {"train_loss": 2.0}]}
        (directory / "trainer_state.json").write_text(json.dumps(state))
    run = adopt(model, adapter, data_path, right, tmp_path / "run")
    assert run.result["trainer_loss"] == loss + 0.01
    assert run.result["trainer_loss_from"] == str(adapter / "checkpoint-20" / "trainer_state.json")
    assert run.result["notes"] == []
    # The recipe's goes first.
    far = write_toml(tmp_path / "far.toml", {**RECIPE, "final_loss": loss / 10})
    with pytest.raises(ValueError, match=r"the trainer's last was .*far\.toml"):
        adopt(model, adapter, data_path, far, tmp_path / "second")
    above = write_toml(tmp_path / "above.toml", {**RECIPE, "final_loss": 30 * loss})
    (note,) = adopt(model, adapter, data_path, above, tmp_path / "third").result["notes"]
    assert "far below the trainer's last" in note


def test_an_adapter_of_a_base_of_another_name_is_noted(tmp_path, model, data_path, finished_run):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (finished_run.path / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/other-7b"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    run = adopt(model, adapter, data_path, write_toml(tmp_path / "recipe.toml", RECIPE), tmp_path / "run")
    assert any("'org/other-7b'" in note for note in run.result["notes"])
