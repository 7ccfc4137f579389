"""Owns what trainers leave behind: from their files to a recipe, and to the questions that these leave open.

Read are `adapter_config.json` (PEFT), `trainer_state.json` and the model card of transformers' Trainer, TRL's
arguments as JSON (`training_args.json`), and the YAML files of axolotl and LLaMA-Factory. `training_args.bin` is a
pickle, which can run code when it is opened, and is never read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmeraser_jax import files
from llmeraser_jax.text import printable

STATE_FILE = "trainer_state.json"
_PICKLE = "training_args.bin"
_MAX_BYTES = 50_000_000

# What is asked where nothing is found, by required recipe key.
QUESTIONS = {
    "template": (
        '"chat" for conversations, "none" for TRL\'s prompt/completion and for text rows, "alpaca", "qa", ... or a '
        "format string: how did a row become text?"
    ),
    "add_bos": 'did the sequence begin with BOS? (may be left out for "chat")',
    "add_eos": 'did the response end with EOS, under the loss? (may be left out for "chat")',
    "loss_on": '"response", "assistant" (all assistant turns) or "all": which tokens were under the loss?',
    "reduction": '"token": the loss was a mean over the tokens of a batch (Hugging Face trainers), else "example"',
    "truncation_side": (
        '"right" (TRL\'s keep_start), "left" (keep_end), or "error" if no row was too long: which end was cut?'
    ),
    "epochs": "how many passes over the data, as a whole number?",
    "l2": "an L2 penalty in the loss; 0.0 with AdamW, whose decay is stated as weight_decay",
    "dropout": "lora_dropout of the training",
}
# The customary names, and those that a retraining for comparison needs.
_OPTIONAL_QUESTIONS = {
    "batch_size": "examples per optimiser step: per device, times accumulation steps, times devices (to retrain)",
    "learning_rate": "the peak learning rate (to retrain)",
    "seed": "any number, if it is not known (to retrain)",
    "final_loss": "the training loss that the trainer reported last; adopt compares its own with it",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """A value of a recipe, and where it was found."""

    value: Any
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundRecipe:
    """What the files of a training say about it.

    Attributes:
        values: by recipe key.
        questions: by recipe key, what could not be found.
        facts: what else was found and serves to recognise the training.
        notes: what to know before the recipe is used.
    """

    values: Mapping[str, Stated]
    questions: Mapping[str, str]
    facts: tuple[str, ...]
    notes: tuple[str, ...]

    def to_toml(self) -> str:
        """The recipe as a file: every value with its source, every question as a comment to replace."""
        lines = [f"# {text}" for text in (*self.facts, *self.notes)]
        lines += [f"{key} = {_literal(stated.value)}  # {stated.source}" for key, stated in self.values.items()]
        if self.questions:
            lines.append("\n# Not found. Answer, and remove the first #:")
            lines += [f"# {key} =   # {question}" for key, question in self.questions.items()]
        return "\n".join(lines) + "\n"


def final_loss_of(directory: str | os.PathLike[str]) -> tuple[float, str] | None:
    """The loss that the trainer logged last and the file that says so; None where no trainer_state.json does.

    The file is looked for beside the adapter, and in the last checkpoint inside that directory.

    Raises:
        ValueError: the file is not what its name says.
    """
    path = _state_path(Path(directory))
    if path is None:
        return None
    with files.reading(path):
        loss = _last_loss(_read_json(path))
    return None if loss is None else (loss, str(path))


def find_recipe(source: str | os.PathLike[str]) -> FoundRecipe:
    """Reads what a trainer left, a directory or one of its files.

    Raises:
        FileNotFoundError: there is no such file, or nothing in it that a trainer leaves.
        ValueError: a file that cannot be read, by name.
    """
    source = Path(source)
    if not source.exists():
        msg = f"{source} does not exist; name the directory of an adapter, or a trainer's file."
        raise FileNotFoundError(msg)
    found = _Findings()
    paths = sorted(source.iterdir()) if source.is_dir() else [source]
    state = _state_path(source) if source.is_dir() else None
    if state is not None and state not in paths:
        paths.append(state)
    documents = []
    for path in paths:
        with files.reading(path):
            documents += _documents(path, found)
    if not documents:
        expected = "adapter_config.json, trainer_state.json, training_args.json, README.md or a YAML file"
        hint = "".join(f" {note}" for note in found.notes)
        msg = f"{source} has nothing that a trainer leaves; expected {expected}.{hint}"
        raise FileNotFoundError(msg)
    for order in _READERS:
        for kind, content, name in documents:
            if kind == order:
                found.source = name
                with files.reading(source / name if source.is_dir() else source):
                    _READERS[order](content, found)
    return found.finish()


class _Findings:
    """Collects; the first to state a key has it, and who states another value is noted."""

    def __init__(self) -> None:
        self.values: dict[str, Stated] = {}
        self.asked: dict[str, str] = {}
        self.facts: list[str] = []
        self.notes: list[str] = []
        self.source = ""

    def state(self, key: str, value: Any, why: str = "") -> None:
        if value is None:
            return
        before = self.values.get(key)
        if before is None:
            self.values[key] = Stated(value=value, source=f"{self.source}: {why}" if why else self.source)
        elif before.value != value:
            self.notes.append(f"{key}: {before.source} says {before.value!r}, {self.source} {value!r}; check it.")

    def ask(self, key: str, question: str) -> None:
        self.asked.setdefault(key, question)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def finish(self) -> FoundRecipe:
        asked = {**QUESTIONS, **_OPTIONAL_QUESTIONS, **self.asked}
        stated_template = self.values.get("template")
        left_out = ("add_bos", "add_eos") if stated_template and stated_template.value == "chat" else ()
        order = [*QUESTIONS, *(key for key in self.values if key not in QUESTIONS)]
        return FoundRecipe(
            values={key: self.values[key] for key in order if key in self.values},
            questions={k: _printable(v) for k, v in asked.items() if k not in self.values and k not in left_out},
            facts=tuple(map(_printable, self.facts)),
            notes=tuple(map(_printable, self.notes)),
        )


def _documents(path: Path, found: _Findings) -> Iterator[tuple[str, Any, str]]:
    """What a file holds that `_READERS` knows: its kind, its content, and what it is called."""
    name = path.name
    if name == _PICKLE:
        found.note(
            f"{_PICKLE} is a pickle, which can run code when it is opened, and is not read. Where you trust it, "
            "write torch.load(..., weights_only=False).to_dict() to training_args.json."
        )
    elif not path.is_file():
        return
    elif name == "adapter_config.json":
        yield "adapter", _mapping(path, _read_json(path)), name
    elif name == STATE_FILE:
        in_checkpoint = path.parent.name.startswith("checkpoint-")
        yield "state", _mapping(path, _read_json(path)), f"{path.parent.name}/{name}" if in_checkpoint else name
    elif name == "tokenizer_config.json":
        yield "tokenizer", _mapping(path, _read_json(path)), name
    elif path.suffix == ".json":
        content = _read_json(path) if name in ("training_args.json", "args.json") or "config" not in name else None
        if isinstance(content, Mapping) and "per_device_train_batch_size" in content:
            yield "arguments", content, name
    elif path.suffix in (".yaml", ".yml"):
        kind, content = _kind_of_yaml(_read_yaml(path))
        if kind:
            yield kind, content, name
    elif name == "README.md":
        yield from _card(_read_text(path))


def _card(text: str) -> Iterator[tuple[str, Any, str]]:
    """The parts of a model card: its list of hyper-parameters, and axolotl's YAML."""
    listed = dict(re.findall(r"^- (\w+): *(.+?) *$", text, flags=re.MULTILINE))
    if "learning_rate" in listed:
        yield "card", listed, "README.md"
    for block in re.findall(r"```ya?ml\n(.*?)```", text, flags=re.DOTALL):
        kind, content = _kind_of_yaml(_parse_yaml(block, "README.md"))
        if kind:
            yield kind, content, "README.md"
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    if front:
        content = _parse_yaml(front[1], "README.md")
        if isinstance(content, Mapping):
            yield "front matter", content, "README.md"


def _kind_of_yaml(content: Any) -> tuple[str | None, Any]:
    if not isinstance(content, Mapping):
        return None, None
    if "base_model" in content and {"micro_batch_size", "datasets", "sequence_len"} & set(content):
        return "axolotl", content
    if "model_name_or_path" in content and {"cutoff_len", "finetuning_type", "stage"} & set(content):
        return "llamafactory", content
    return ("arguments", content) if "per_device_train_batch_size" in content else (None, None)


def _read_arguments(content: Mapping[str, Any], found: _Findings) -> None:
    """Arguments of TRL's SFTTrainer, or of transformers' Trainer that it is built on."""
    _common_arguments(content, found)
    found.state("reduction", "token", "its trainer averages over the tokens of a batch")
    if "max_length" in content or "max_seq_length" in content:
        found.state("max_length", content.get("max_length") or content.get("max_seq_length"))
    side = {"keep_start": "right", "keep_end": "left"}.get(str(content.get("truncation_mode")))
    if content.get("packing") and content.get("packing_strategy") == "bfd_split":
        found.state("truncation_side", "error", "bfd_split divides rows longer than max_length; take them out")
    elif side:
        found.state("truncation_side", side, f"truncation_mode = {content['truncation_mode']}")
    if content.get("assistant_only_loss"):
        found.state("loss_on", "assistant", "assistant_only_loss")
    elif content.get("completion_only_loss"):
        found.state("loss_on", "response", "completion_only_loss")
    else:
        found.ask(
            "loss_on",
            'TRL\'s default: "response" for rows of prompt and completion, "all" for text and messages; which?',
        )
    if content.get("loss_type") not in (None, "nll", "chunked_nll"):
        found.note(f"loss_type is {content['loss_type']!r}; the objective here is the cross entropy.")
    if content.get("packing"):
        strategy = content.get("packing_strategy")
        if strategy == "wrapped":
            _refuse_packing(found, 'packing_strategy = "wrapped"')
        elif "flash" in str(_part(content, "model_init_kwargs").get("attn_implementation")):
            found.state("packing", "isolated", "flash attention keeps packed rows apart")
        else:
            found.ask(
                "packing",
                '"isolated" where TRL packed with flash attention: rows did not see each other, and their token '
                "mean is that of unpacked rows. true where they did: none can be removed by itself",
            )


def _common_arguments(content: Mapping[str, Any], found: _Findings) -> None:
    """What transformers' Trainer takes, and LLaMA-Factory with it."""
    _epochs(content.get("num_train_epochs"), content.get("max_steps"), found)
    found.state("learning_rate", _number(content.get("learning_rate")))
    per_device, accumulation = (
        content.get("per_device_train_batch_size"),
        content.get("gradient_accumulation_steps"),
    )
    _batch(per_device, accumulation, found)
    found.state("seed", content.get("seed"))
    _decay(content.get("weight_decay"), found)
    for ours, theirs in (("adam_b1", "adam_beta1"), ("adam_b2", "adam_beta2"), ("adam_eps", "adam_epsilon")):
        found.state(ours, _number(content.get(theirs)))
    norm = _number(content.get("max_grad_norm"))
    found.state("max_grad_norm", norm if norm else None)
    ratio, steps = _number(content.get("warmup_ratio")), _number(content.get("warmup_steps"))
    if ratio or (steps is not None and 0 < steps < 1):
        found.state("warmup_ratio", ratio or steps)
    elif steps == 0:
        found.state("warmup_ratio", 0.0)
    _optimiser(content.get("optim"), content.get("lr_scheduler_type"), found)


def _read_axolotl(content: Mapping[str, Any], found: _Findings) -> None:
    found.facts.append(f"base model: {content.get('base_model')} ({found.source}, axolotl)")
    _epochs(content.get("num_epochs"), content.get("max_steps"), found)
    found.state("learning_rate", _number(content.get("learning_rate")))
    _batch(content.get("micro_batch_size"), content.get("gradient_accumulation_steps"), found)
    found.state("seed", content.get("seed"))
    _decay(content.get("weight_decay", 0.0), found)
    found.state("dropout", _number(content.get("lora_dropout")))
    found.state("max_length", content.get("sequence_len"))
    found.state("max_grad_norm", _number(content.get("max_grad_norm")) or None)
    found.state("warmup_ratio", _number(content.get("warmup_ratio")))
    found.state("reduction", "token", "axolotl averages over the tokens of a batch")
    found.state("truncation_side", "error", "axolotl leaves out rows longer than sequence_len; take them out too")
    _optimiser(content.get("optimizer"), content.get("lr_scheduler"), found)
    if content.get("sample_packing"):
        found.state("packing", "isolated", "sample_packing keeps attention inside each row")
    datasets = content.get("datasets")
    first = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], Mapping) else {}
    if isinstance(datasets, list) and len(datasets) > 1:
        found.note(f"{found.source} lists {len(datasets)} datasets; the recipe is for rows of one kind.")
    kind = str(first.get("type"))
    everything = bool(content.get("train_on_inputs"))
    if kind == "chat_template":
        found.state("template", "chat", "datasets.type = chat_template")
        roles = first.get("roles_to_train", ["assistant"])
        if everything:
            found.state("loss_on", "all", "train_on_inputs")
        elif roles in (["assistant"], ["gpt"], ["assistant", "gpt"]):
            found.state("loss_on", "assistant", "roles_to_train")
        else:
            found.note(
                f"roles_to_train is {roles!r}; a loss on turns of others than the assistant is not supported."
            )
    elif kind == "alpaca":
        found.state("template", "alpaca", "datasets.type = alpaca")
        found.state("loss_on", "all" if everything else "response", f"train_on_inputs = {everything}")
        found.state("add_eos", True, "axolotl ends every response with EOS")
    elif kind == "completion":
        found.state("template", "none", "datasets.type = completion")
        found.state("loss_on", "all", "datasets.type = completion")
        found.state("add_eos", True, "axolotl ends every text with EOS")
    else:
        found.ask("template", f"axolotl's type {kind!r}: {QUESTIONS['template']}")


def _read_llamafactory(content: Mapping[str, Any], found: _Findings) -> None:
    found.facts.append(f"base model: {content.get('model_name_or_path')} ({found.source}, LLaMA-Factory)")
    _common_arguments({"weight_decay": 0.0, **content}, found)
    found.state("dropout", _number(content.get("lora_dropout", 0.0)))
    found.state("max_length", content.get("cutoff_len"))
    found.state("reduction", "token", "its trainer averages over the tokens of a batch")
    found.state(
        "truncation_side",
        "error",
        "LLaMA-Factory cuts prompt and response in proportion, which is not repeated here",
    )
    if content.get("train_on_prompt"):
        found.state("loss_on", "all", "train_on_prompt")
    elif content.get("mask_history"):
        found.state("loss_on", "response", "mask_history")
    else:
        found.state("loss_on", "assistant", "train_on_prompt and mask_history are off")
    if content.get("neat_packing"):
        found.state("packing", "isolated", "neat_packing keeps attention inside each row")
    elif content.get("packing"):
        _refuse_packing(found, "packing = true without neat_packing")
    found.ask(
        "template",
        f"LLaMA-Factory's template {content.get('template')!r} is its own. \"chat\" if the tokenizer's chat "
        "template renders the same: compare `llmeraser preview` with what it printed when training began",
    )


def _read_card(content: Mapping[str, str], found: _Findings) -> None:
    """The list of hyper-parameters of a card that transformers' Trainer wrote."""
    _epochs(_number(content.get("num_epochs")), None, found)
    found.state("learning_rate", _number(content.get("learning_rate")))
    total = _number(content.get("total_train_batch_size"))
    if total:
        found.state("batch_size", int(total), "total_train_batch_size")
    else:
        _batch(_number(content.get("train_batch_size")), _number(content.get("gradient_accumulation_steps")), found)
    seed = _number(content.get("seed"))
    found.state("seed", None if seed is None else int(seed))
    found.state("warmup_ratio", _number(content.get("lr_scheduler_warmup_ratio")))
    found.state("reduction", "token", "its trainer averages over the tokens of a batch")
    _optimiser(str(content.get("optimizer", "adamw")).lower(), content.get("lr_scheduler_type"), found)


def _read_state(content: Mapping[str, Any], found: _Findings) -> None:
    loss = _last_loss(content)
    if loss is not None:
        found.state("final_loss", loss, "the last of log_history")
    _epochs(content.get("num_train_epochs"), None, found)
    if isinstance(content.get("global_step"), int):
        found.facts.append(f"optimiser steps: {content['global_step']} ({found.source})")


def _read_adapter(content: Mapping[str, Any], found: _Findings) -> None:
    before = found.values.pop("dropout", None)
    found.state("dropout", _number(content.get("lora_dropout", 0.0)), "lora_dropout")
    if before is not None and before.value != found.values["dropout"].value:
        found.note(f"dropout: {before.source} says {before.value!r}; what PEFT recorded is taken.")
    found.facts.append(f"base model: {content.get('base_model_name_or_path')} ({found.source})")
    found.facts.append(f"LoRA of rank {content.get('r')}, alpha {content.get('lora_alpha')} ({found.source})")


def _read_tokenizer(content: Mapping[str, Any], found: _Findings) -> None:
    template = found.values.get("template")
    if isinstance(content.get("add_bos_token"), bool) and not (template and template.value == "chat"):
        found.state("add_bos", content["add_bos_token"], "add_bos_token; trainers leave BOS to the tokenizer")


def _read_front_matter(content: Mapping[str, Any], found: _Findings) -> None:
    for key in ("base_model", "datasets", "tags"):
        if content.get(key):
            found.facts.append(f"{key}: {json.dumps(content[key], ensure_ascii=True)[:200]} ({found.source})")


# In the order in which they are believed.
_READERS: dict[str, Callable[[Any, _Findings], None]] = {
    "arguments": _read_arguments,
    "axolotl": _read_axolotl,
    "llamafactory": _read_llamafactory,
    "card": _read_card,
    "state": _read_state,
    "adapter": _read_adapter,
    "tokenizer": _read_tokenizer,
    "front matter": _read_front_matter,
}


def _epochs(epochs: Any, max_steps: Any, found: _Findings) -> None:
    number = _number(epochs)
    if isinstance(max_steps, int) and max_steps > 0:
        found.ask("epochs", f"training was for {max_steps} steps: how many passes over the data is that?")
    elif number is not None and number >= 1 and number == int(number):
        found.state("epochs", int(number))
    elif number is not None:
        found.ask("epochs", f"{found.source} says {number}: a whole number of passes is needed")


def _batch(per_device: Any, accumulation: Any, found: _Findings) -> None:
    size, times = _number(per_device), _number(accumulation) or 1
    if size:
        found.state(
            "batch_size", int(size * times), "per device and accumulated; multiply by the number of devices"
        )
        found.state("microbatch_size", int(size), "per device")


def _decay(decay: Any, found: _Findings) -> None:
    number = _number(decay)
    if number is None:
        return
    found.state("l2", 0.0, "no penalty in the loss; AdamW's decay is decoupled")
    found.state("weight_decay", number)


def _optimiser(name: Any, schedule: Any, found: _Findings) -> None:
    if name is not None and "adam" not in str(name):
        found.note(f"The optimiser was {name!r}; a retraining for comparison uses Adam.")
    if schedule is not None and "cosine" not in str(schedule):
        found.note(f"The schedule was {schedule!r}; a retraining for comparison uses a cosine.")


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name)
    return value if isinstance(value, Mapping) else {}


def _refuse_packing(found: _Findings, why: str) -> None:
    found.state("packing", True, f"{why}: packed rows saw each other, so none can be removed by itself")
    found.note(
        f"{found.source} packs rows with attention across them ({why}); such an adapter cannot be erased from."
    )


def _printable(text: str) -> str:
    """One line, in which a terminal or TOML finds nothing but text."""
    return printable(text[:500], keep="")


def _number(value: Any) -> float | None:
    """A number, also one that YAML reads as text (1e-4)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _state_path(directory: Path) -> Path | None:
    if (directory / STATE_FILE).is_file():
        return directory / STATE_FILE
    steps = {
        int(path.parent.name.split("-")[1]): path
        for path in directory.glob(f"checkpoint-*/{STATE_FILE}")
        if path.parent.name.split("-")[1].isdecimal()
    }
    return steps[max(steps)] if steps else None


def _last_loss(content: Any) -> float | None:
    history = content.get("log_history") if isinstance(content, Mapping) else None
    logged = [entry.get("loss") for entry in history or () if isinstance(entry, Mapping)]
    numbers = [number for number in map(_number, logged) if number is not None]
    return numbers[-1] if numbers else None


def _mapping(path: Path, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        msg = f"{path} holds a {type(content).__name__}, not an object."
        raise ValueError(msg)
    return content


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        msg = f"{path} has {path.stat().st_size} bytes; a trainer's file has at most {_MAX_BYTES}."
        raise ValueError(msg)
    return path.read_bytes().decode("utf-8", errors="replace")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not a JSON file: {str(error)[:200]}."
        raise ValueError(msg) from error


def _read_yaml(path: Path) -> Any:
    return _parse_yaml(_read_text(path), str(path))


def _parse_yaml(text: str, name: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        msg = f"{name} is not YAML: {' '.join(str(error).split())[:300]}."
        raise ValueError(msg) from error
