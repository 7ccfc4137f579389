"""What a user can hand in: whole examples of every kind of file, and the loader that a command calls for each."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pyarrow
import pyarrow.parquet

from llmeraser_jax.data import Recipe, encode_examples, load_examples, load_requests
from llmeraser_jax.evaluation.job import write_overview
from llmeraser_jax.lora import Lora, LoraConfig, init_lora, load_adapter, save_adapter
from llmeraser_jax.models import Model, load_model, load_tokenizer
from llmeraser_jax.models.loading import read_config
from llmeraser_jax.runs import load_run, write_run
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.training.adopt import load_training_recipe
from llmeraser_jax.training.trainers import final_loss_of, find_recipe
from tests.data.chat_tokenizers import byte_tokenizer
from tests.evaluation.test_summary import STEPS, _receipt
from tests.fuzz import mutators
from tests.fuzz.mutators import Files
from tests.training import tiny

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = (
    "{% for i in range(90000) %}{% for j in range(90000) %}{{ 1 // 1 }}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ messages[99]['content'] }}",
    "{{ 1 / 0 }}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ messages + 3 }}",
    "{% if %}",
    "{{ raise_exception('\x1b[31mno') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | tojson | length }}",
    "",
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """One kind of input.

    Attributes:
        name: of the kind.
        files: a whole one.
        targets: the files that are damaged.
        load: reads it from a directory, as a command does.
        also: makes another damage than `mutators.directory`'s, at times; None where there is no other.
    """

    name: str
    files: Files
    targets: list[str]
    load: Callable[[Path], Any]
    also: Callable[[random.Random, Files], tuple[Files, str]] | None = None

    def damaged(self, seed: int) -> tuple[Files, str]:
        """Damaged files, and the name of the one that is."""
        rng = random.Random(f"{self.name} {seed}")
        if self.also is not None and rng.random() < 0.2:
            return self.also(rng, dict(self.files))
        return mutators.directory(rng, self.files, self.targets)


def read_directory(path: Path) -> Files:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_directory(path: Path, files: Files) -> None:
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


REQUESTS = [
    {"id": "r1", "action": "remove"},
    {"id": "r4", "action": "modify_query", "instruction": "colour of s11"},
    {"id": "r7", "action": "correct_response", "response": "red"},
]
MESSAGES = [
    {
        "id": k,
        "messages": [{"role": "user", "content": "of"}, {"role": "assistant", "content": "red"}],
        "chat_template_kwargs": {"x": 1},
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    for k in range(3)
]
RECIPE = b"""template = "plain"
add_bos = true
add_eos = true
loss_on = "response"
reduction = "example"
truncation_side = "left"
epochs = 3
l2 = 0.0
dropout = 0.0
final_loss = 0.0086
max_length = 32
truncate = "sequence"
response_prefix = ""
tokenization = "separate"
batch_size = 4
learning_rate = 1e-4
microbatch_size = 4
warmup_ratio = 0.05
seed = 0
adam_b1 = 0.9
adam_eps = 1e-8
max_grad_norm = 1.0
weight_decay = 0.01
"""
CHAT_RECIPE = b"""template = "chat"
chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
chat_template_kwargs = { enable_thinking = false }
date = "2026-01-31"
"""
AXOLOTL = {
    "base_model": "b", "datasets": [{"path": "p", "type": "chat_template", "roles_to_train": ["assistant"]}],
    "sequence_len": 512, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 3,
    "learning_rate": 1e-4, "lora_dropout": 0.05, "optimizer": "adamw", "lr_scheduler": "cosine", "seed": 1,
    "weight_decay": 0.0, "warmup_ratio": 0.1, "sample_packing": True, "train_on_inputs": False,
}  # fmt: skip
LLAMAFACTORY = {
    "model_name_or_path": "b", "stage": "sft", "finetuning_type": "lora", "cutoff_len": 512, "template": "qwen",
    "num_train_epochs": 3.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
    "learning_rate": "1e-4", "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
}  # fmt: skip
ARGUMENTS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3, "max_steps": -1,
    "learning_rate": 2e-4, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "warmup_steps": 0, "optim": "adamw_torch", "lr_scheduler_type": "cosine", "seed": 42, "max_length": 1024,
    "truncation_mode": "keep_start", "packing": True, "packing_strategy": "bfd", "assistant_only_loss": False,
}  # fmt: skip
SOME_RECEIPT = json.dumps(_receipt(*STEPS))
CARD = b"""---
base_model: b
tags: [trl, sft]
---
# A model
- learning_rate: 0.0002
- train_batch_size: 2
- num_epochs: 3
```yaml
base_model: b
datasets: []
sequence_len: 8
```
"""


def _odd_table(rng: random.Random, files: Files) -> tuple[Files, str]:
    """A parquet file that is whole, with columns of other types or metadata of another writer."""
    columns: dict[str, Any] = {
        "instruction": ["a", "b"],
        "output": ["c", "d"],
        "id": [1, 2],
    }
    odd = (
        [None, None], [1.5, float("nan")], [b"\xff\xfe", b"x"], [[1], [2, 3]], [{"a": 1}, {"a": None}],
        [True, False], [10**30, 1], ["a", None], ["", ""], ["\x1b[31m", "\x00"], [["a"], None],
    )  # fmt: skip
    name = rng.choice((*columns, "input", "__index_level_0__", "messages", "tools", "\x1b[2J"))
    try:
        columns[name] = pyarrow.array(rng.choice(odd))
    except (OverflowError, pyarrow.ArrowException):
        columns[name] = [0, 0]
    table = pyarrow.table(columns)
    index: Any = rng.choice(
        (None, [], 3, {"start": 1}, [{"start": 0}], [{"start": "a", "stop": 2, "step": 1}], [None], "x",
         [{"start": 5, "stop": 9, "step": 2}], [{"start": 5, "stop": 9, "step": 0}], [[1]])
    )  # fmt: skip
    written = rng.choice((b"{", b"3", b"\xff", json.dumps({"index_columns": index}).encode()))
    table = table.replace_schema_metadata({b"pandas": written})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return {**files, "data.parquet": sink.getvalue()}, "data.parquet"


def _odd_tokenizer(rng: random.Random, files: Files) -> tuple[Files, str]:
    """A chat template that fails, loops or blows up; code that the tokenizer would have run; other classes."""
    if rng.random() < 0.5:
        return {**files, "chat_template.jinja": rng.choice(TEMPLATES).encode()}, "chat_template.jinja"
    config = json.loads(files["tokenizer_config.json"])
    config |= rng.choice(
        (
            {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}, "tokenizer_class": "Mine"},
            {"auto_map": {"AutoTokenizer": ["org/name--mine.Tokenizer", None]}},
            {"tokenizer_class": "LlamaTokenizer"},
            {"tokenizer_class": "Mine"},
            {"tokenizer_class": 3},
            {"model_max_length": -1},
            {"extra_special_tokens": 3},
            {"added_tokens_decoder": {"0": {"content": 3}}},
            {"added_tokens_decoder": {"999999999": {"content": "<a>", "special": True}}},
            {"eos_token": None},
            {"eos_token": {"content": 3}},
            {"bos_token": "<nowhere>"},
            {"chat_template": 3},
            {"chat_template": [{"name": "x"}]},
            {"chat_template": {"default": "{{ messages }}"}},
        )
    )
    code = b"import pathlib\npathlib.Path('ran').write_text('ran')\nclass Tokenizer:\n    pass\n"
    return {**files, "tokenizer_config.json": json.dumps(config).encode(), "mine.py": code}, "tokenizer_config.json"


def _odd_run(rng: random.Random, files: Files) -> tuple[Files, str]:
    """run.json with one of its own fields, or one a level below, of another kind: what `json_value` seldom hits."""
    content = json.loads(files["run.json"])
    parent, key = content, rng.choice(list(content))
    if isinstance(parent[key], dict) and parent[key] and rng.random() < 0.7:
        parent = parent[key]
        key = rng.choice(list(parent))
    parent[key] = rng.choice(mutators.ODD_VALUES)
    return {**files, "run.json": mutators.to_text(content).encode("utf-8", "surrogatepass")}, "run.json"


def make_subjects(work: Path) -> dict[str, Subject]:
    """All of them; `work` gets the whole files."""
    model_path = tiny.save_tiny_model(work / "model")
    model = load_model(model_path)
    examples = load_examples(tiny.rows())
    lora = init_lora(jax.random.key(0), LoraConfig(rank=2, rank_pattern={"v_proj": 1}), model.config)
    save_adapter(work / "adapter", lora, model)
    base = read_directory(model_path)
    adapter = read_directory(work / "adapter")
    byte_tokenizer(CHAT).save_pretrained(str(work / "tokenizer"))
    tokenizer = read_directory(work / "tokenizer")
    import datasets

    datasets.Dataset.from_list(tiny.rows(4)).save_to_disk(str(work / "dataset"))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tiny.rows(4)), sink)
    csv = b"id,instruction,input,output\n1,colour of s1,,red\n2,colour of s2,now,blue\n3,x,,y\n"
    chat = load_examples(MESSAGES)
    weights = {name: content for name, content in base.items() if name.endswith((".json", ".safetensors"))}
    weights = {name: content for name, content in weights.items() if "token" not in name}
    shard = {f"model-0000{k}-of-00001.safetensors": weights["model.safetensors"] for k in (1,)}
    names = json.loads(shard["model-00001-of-00001.safetensors"][8:].split(b"}}")[0] + b"}}")
    listed = {name: "model-00001-of-00001.safetensors" for name in names if name != "__metadata__"}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}).encode()
    sharded = {"config.json": weights["config.json"], "model.safetensors.index.json": index, **shard}
    trained = {
        "adapter_config.json": adapter["adapter_config.json"],
        "trainer_state.json": json.dumps(
            {"num_train_epochs": 3, "global_step": 9, "log_history": [{"loss": 0.5, "step": 1}, {"eval_loss": 1}]}
        ).encode(),
        "training_args.json": json.dumps(ARGUMENTS).encode(),
        "tokenizer_config.json": b'{"add_bos_token": true}',
        "axolotl.yaml": json.dumps(AXOLOTL).encode(),
        "llamafactory.yml": json.dumps(LLAMAFACTORY).encode(),
        "README.md": CARD,
    }
    results = _results(work, model, lora)

    def load_with_tokenizer(path: Path):
        loaded = load_tokenizer(path)
        if loaded is not None:
            encode_examples(chat[:1], Recipe(), loaded)
            encode_examples(examples[:1], Recipe(), loaded)

    def load_recipe(path: Path):
        recipe = load_training_recipe(path / "recipe.toml").recipe
        encode_examples(examples[:2], recipe, model.tokenizer)

    def load_chat_recipe(path: Path):
        from llmeraser_jax.training.adopt import load_recipe as any_recipe

        encode_examples(chat[:1], any_recipe(path / "recipe.toml"), byte)

    byte = byte_tokenizer(CHAT)

    def trainer(path: Path):
        find_recipe(path).to_toml()
        final_loss_of(path)

    def overview(path: Path):
        write_overview([path / "result"], path / "page")

    def one(name: str, content: bytes, load: Callable[[Path], Any], **more: Any) -> Subject:
        (suffix,) = more.pop("suffix", [name.rpartition(" ")[2]])
        file = f"data.{suffix}"
        return Subject(name, {file: content}, [file], lambda path: load(path / file), **more)

    def bare(path: Path) -> Model:
        return load_model(path)

    subjects = [
        one("requests jsonl", _lines(REQUESTS), lambda path: load_requests(path, examples)),
        one("data jsonl", _lines(tiny.rows(4)), load_examples),
        one("messages jsonl", _lines(MESSAGES), load_examples),
        one("data json", json.dumps(tiny.rows(3)).encode(), load_examples),
        one("data csv", csv, load_examples),
        one("data parquet", sink.getvalue(), load_examples, also=_odd_table),
        Subject("data directory", *_all(read_directory(work / "dataset")), load_examples),
        Subject("adapter", *_all(adapter), lambda path: load_adapter(path, model)),
        Subject("configuration", weights, ["config.json", "generation_config.json"], read_config),
        Subject("base", weights, ["model.safetensors", "config.json"], bare),
        Subject("sharded base", sharded, ["model.safetensors.index.json", *shard], bare),
        Subject("tokenizer", *_all(tokenizer), load_with_tokenizer, _odd_tokenizer),
        Subject("recipe", {"recipe.toml": RECIPE}, ["recipe.toml"], load_recipe),
        Subject("chat recipe", {"recipe.toml": CHAT_RECIPE}, ["recipe.toml"], load_chat_recipe),
        Subject("trainer's files", *_all(trained), trainer),
        Subject("run", results["run"], ["run.json"], load_run, _odd_run),
        Subject("receipt", _below(results["erased"]), ["result/run.json", "result/receipt.json"], overview),
    ]
    return {subject.name: subject for subject in subjects}


def _all(files: Files) -> tuple[Files, list[str]]:
    return files, list(files)


def _below(files: Files) -> Files:
    return {f"result/{name}": content for name, content in files.items()}


def _results(work: Path, model: Model, lora: Lora) -> dict[str, Files]:
    """The small files of a fine-tuning and of an erasure, without what takes time to compute."""
    examples = load_examples(tiny.rows())
    dataset = encode_examples(examples, tiny.RECIPE, model.tokenizer)
    recorded = dict(json.loads(SOME_RECEIPT), counts={"remove": 1, "modify_query": 1, "correct_response": 1})
    for kind, name in (("finetune", "run"), ("erase", "erased")):
        write_run(
            work / name,
            kind=kind,
            model=model,
            recipe=dataset.recipe,
            normalizer=dataset.normalizer,
            train_config=TrainConfig(epochs=1),
            examples=examples,
            data_path=None,
            lora=lora,
            initial_lora=lora,
            result={"loss": 1.0, "seconds": 2.0, "gradient_equivalents": 10.0, "gradient_norm": 0.1},
            receipts=[{"sha256": "0" * 64, "counts": recorded["counts"], "outcome": "complete"}]
            * (kind == "erase"),
            dataset=dataset,
        )
    (work / "erased" / "receipt.json").write_text(json.dumps(recorded))
    wanted = ("run.json", "receipt.json", "adapter/adapter_config.json", "initial_adapter/adapter_config.json")
    return {
        name: {file: content for file, content in read_directory(work / name).items() if file in wanted}
        for name in ("run", "erased")
    }
