"""What trainers leave becomes a recipe; what they do not say is asked."""

import json
import pickle

import pytest

from llmeraser_jax.cli import main
from llmeraser_jax.training.adopt import REQUIRED_KEYS, load_training_recipe
from llmeraser_jax.training.trainers import QUESTIONS, find_recipe

ADAPTER = {"base_model_name_or_path": "org/base", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
STATE = {
    "global_step": 36,
    "num_train_epochs": 3,
    "log_history": [{"loss": 2.5, "step": 10}, {"loss": 0.31, "step": 36}, {"train_loss": 1.2, "step": 36}],
}
TRL = {
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 42,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "packing": False,
    "packing_strategy": "bfd",
    "completion_only_loss": None,
    "assistant_only_loss": True,
    "loss_type": "nll",
}
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
adapter: lora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_dropout: 0.05
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_ratio: 0.1
weight_decay: 0.01
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity
template: llama3
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
"""
CARD = """---
library_name: peft
base_model: org/base
tags: [trl, sft]
---
# out

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.0002
- train_batch_size: 2
- eval_batch_size: 8
- seed: 7
- gradient_accumulation_steps: 4
- total_train_batch_size: 16
- optimizer: Use adamw_torch with betas=(0.9,0.999) and epsilon=1e-08
- lr_scheduler_type: cosine
- lr_scheduler_warmup_ratio: 0.1
- num_epochs: 2
"""


def values(found):
    return {key: stated.value for key, stated in found.values.items()}


def write(directory, **contents):
    directory.mkdir(exist_ok=True)
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_every_required_key_has_a_question():
    assert tuple(QUESTIONS) == REQUIRED_KEYS


def test_trl_with_its_arguments_as_json(tmp_path):
    tokenizer = {"add_bos_token": True}
    source = write(
        tmp_path / "out",
        adapter_config__json=ADAPTER,
        trainer_state__json=STATE,
        training_args__json=TRL,
        tokenizer_config__json=tokenizer,
    )
    found = find_recipe(source)
    assert values(found) == {
        "add_bos": True,
        "loss_on": "assistant",
        "reduction": "token",
        "truncation_side": "right",
        "epochs": 3,
        "l2": 0.0,
        "dropout": 0.05,
        "learning_rate": 2e-4,
        "batch_size": 32,
        "microbatch_size": 4,
        "seed": 42,
        "weight_decay": 0.0,
        "adam_b1": 0.9,
        "adam_b2": 0.999,
        "adam_eps": 1e-8,
        "max_grad_norm": 1.0,
        "warmup_ratio": 0.0,
        "max_length": 1024,
        "final_loss": 0.31,
    }
    assert found.values["final_loss"].source.startswith("trainer_state.json")
    assert set(found.questions) == {"template", "add_eos"}
    assert any("org/base" in fact for fact in found.facts)


def test_without_arguments_the_card_is_read_and_the_rest_is_asked(tmp_path):
    found = find_recipe(write(tmp_path / "out", adapter_config__json=ADAPTER, README__md=CARD))
    stated = values(found)
    assert (stated["batch_size"], stated["epochs"], stated["seed"]) == (16, 2, 7)
    assert (stated["learning_rate"], stated["warmup_ratio"], stated["dropout"]) == (2e-4, 0.1, 0.05)
    assert {"template", "loss_on", "l2", "truncation_side"} <= set(found.questions)


def test_axolotl_alone_and_inside_its_model_card(tmp_path):
    (tmp_path / "axolotl.yaml").write_text(AXOLOTL)
    alone = find_recipe(tmp_path / "axolotl.yaml")
    stated = values(alone)
    assert stated["template"] == "alpaca" and stated["loss_on"] == "response" and stated["add_eos"] is True
    assert (stated["batch_size"], stated["learning_rate"], stated["weight_decay"]) == (4, 2e-4, 0.01)
    assert stated["packing"] == "isolated" and "attention inside each row" in alone.values["packing"].source
    assert (stated["dropout"], stated["max_length"]) == (0.05, 2048)
    assert set(alone.questions) == {"add_bos", "seed", "final_loss"}
    card = f"---\nbase_model: x\n---\n<details>\n\n```yaml\n{AXOLOTL}```\n</details>\n"
    assert values(find_recipe(write(tmp_path / "out", README__md=card))) == stated


def test_llama_factory_asks_which_template_its_own_is(tmp_path):
    (tmp_path / "train.yaml").write_text(LLAMA_FACTORY)
    found = find_recipe(tmp_path / "train.yaml")
    stated = values(found)
    assert "template" not in stated and "'llama3'" in found.questions["template"]
    assert (stated["loss_on"], stated["reduction"], stated["dropout"]) == ("assistant", "token", 0.0)
    assert (stated["batch_size"], stated["epochs"], stated["max_length"]) == (8, 3, 2048)


@pytest.mark.parametrize(
    ("extra", "packed"),
    [("packing: true", True), ("packing: true\nneat_packing: true", "isolated")],
)
def test_packing_with_attention_across_rows_is_stated_and_so_refused(tmp_path, extra, packed):
    (tmp_path / "train.yaml").write_text(LLAMA_FACTORY + extra)
    found = find_recipe(tmp_path / "train.yaml")
    assert values(found)["packing"] == packed
    assert any("attention across them" in note for note in found.notes) is (packed is True)
    trl = {**TRL, "packing": True, "packing_strategy": "wrapped"}
    (tmp_path / "training_args.json").write_text(json.dumps(trl))
    assert values(find_recipe(tmp_path / "training_args.json"))["packing"] is True
    (tmp_path / "training_args.json").write_text(json.dumps({**TRL, "packing": True}))
    assert "flash attention" in find_recipe(tmp_path / "training_args.json").questions["packing"]
    flash = {"packing": True, "model_init_kwargs": {"attn_implementation": "kernels-community/flash-attn2"}}
    (tmp_path / "training_args.json").write_text(json.dumps({**TRL, **flash, "packing_strategy": "bfd_split"}))
    stated = values(find_recipe(tmp_path / "training_args.json"))
    assert stated["packing"] == "isolated" and stated["truncation_side"] == "error"


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def test_the_pickle_is_never_opened_and_that_is_said(tmp_path):
    source = write(tmp_path / "out", adapter_config__json=ADAPTER)
    (source / "training_args.bin").write_bytes(pickle.dumps(_Bomb()))
    assert any("training_args.bin is a pickle" in note for note in find_recipe(source).notes)
    with pytest.raises(FileNotFoundError, match=r"nothing that a trainer leaves.*is a pickle"):
        find_recipe(source / "training_args.bin")


def test_what_contradicts_is_noted_and_what_peft_recorded_wins(tmp_path):
    source = write(
        tmp_path / "out",
        adapter_config__json=ADAPTER,
        trainer_state__json={**STATE, "num_train_epochs": 5},
        config__yaml=AXOLOTL.replace("lora_dropout: 0.05", "lora_dropout: 0.1"),
    )
    found = find_recipe(source)
    assert values(found)["epochs"] == 1 and values(found)["dropout"] == 0.05
    assert any(note.startswith("epochs: config.yaml says 1, trainer_state.json 5") for note in found.notes)
    assert any("0.1; what PEFT recorded" in note for note in found.notes)


def test_what_is_not_text_reaches_neither_terminal_nor_recipe(tmp_path):
    odd = {**ADAPTER, "base_model_name_or_path": "a\x1b[2J\nepochs = 7"}
    text = find_recipe(write(tmp_path / "out", adapter_config__json=odd)).to_toml()
    assert "\x1b" not in text and r"a\x1b[2J\nepochs = 7" in text
    assert "epochs = 7" not in text.splitlines()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", "[1]"),
        ("trainer_state.json", "{"),
        ("train.yaml", "a: [1"),
        ("train.yaml", "{" * 5000),
        ("adapter_config.json", "[" * 100_000),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as raised:
        find_recipe(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_the_console_writes_a_recipe_that_adopt_reads_once_the_questions_are_answered(tmp_path, capsys):
    source = write(
        tmp_path / "out", adapter_config__json=ADAPTER, training_args__json=TRL, trainer_state__json=STATE
    )
    assert main(["recipe", str(source)]) == 0
    printed = capsys.readouterr().out
    recipe = tmp_path / "recipe.toml"
    assert main(["recipe", str(source), "--output", str(recipe)]) == 0
    assert recipe.read_text() == printed
    assert "# template =   #" in printed
    recipe.write_text(printed.replace("# template =  ", 'template = "chat"'))
    stated = load_training_recipe(recipe)
    assert stated.recipe.loss_on == "assistant" and stated.recipe.max_length == 1024
    assert stated.train_config.batch_size == 32 and stated.final_loss == 0.31 and stated.unstated == ()
    assert main(["recipe", str(source), "--output", str(recipe)]) == 1


@pytest.mark.torch
def test_the_arguments_that_the_installed_trl_writes(tmp_path):
    trl = pytest.importorskip("trl")
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "num_train_epochs": 2}
    config = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)
    (tmp_path / "training_args.json").write_text(config.to_json_string())
    found = find_recipe(tmp_path)
    stated = values(found)
    assert (stated["batch_size"], stated["epochs"], stated["truncation_side"]) == (15, 2, "right")
    assert stated["max_length"] == config.max_length and stated["seed"] == config.seed
    assert "loss_on" in found.questions and "packing" not in found.questions
