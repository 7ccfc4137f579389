"""Rows, templates and recipes whose tokens TRL's trainer decides; minimal templates, each with a family's habit."""

import types
from collections.abc import Iterator
from typing import Any

from tests.data.chat_tokenizers import byte_tokenizer

_CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Each name says what the template does that assembling a conversation from parts gets wrong.
TEMPLATES = {
    "chatml": _CHATML,
    "thinks in the last turn": (
        "{%- for m in messages %}{%- set c = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{{- c + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    ),
    "prompts with an open thought": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}"
        "{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    ),
    "trims": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "renames roles": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + (m.role if m.role != 'assistant' else "
        "'model') + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "ends the sequence where no answer follows": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "writes a space after the prompt": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "has no generation prompt": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    ),
    "marks what is generated": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
        "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
        "{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "shows tools": (
        "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for t in tools %}{{- t | tojson + '\n' }}{%- endfor %}"
        "{{- '<|im_end|>\n' }}{%- endif %}" + _CHATML
    ),
    "has no turn end": (
        "{{ bos_token }}{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    ),
}


_NO_TOOLS = "{%- if tools is not none %}{{- 'Tools: ' + tools | tojson }}{%- endif %}" + _CHATML


def _messages(*contents, system=None):
    """Turns of user and assistant, one after the other."""
    turns = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = [
    _messages("Where does Ona live?", "In Turku."),
    _messages("Who?", "Ona.", "Where? ", " Turku. \n"),
    _messages("Who?", "Lily", "Où?", "là 東", system="Be brief."),
    _messages("Why?", "<think>\nHm.\n</think>\n\nSo.", "So?", "No."),
]
_TOOL = {"type": "function", "function": {"name": "find", "parameters": {"who": {"type": "string"}, "at": {}}}}

# The rows of one kind, the trainer's options, and the same said by a recipe.
_KINDS = {
    "messages": ("messages", {}, {"loss_on": "all"}),
    "prompt and completion": ("pair", {"completion_only": True}, {"loss_on": "response"}),
    "assistant turns": ("messages", {"assistant_only": True}, {"loss_on": "assistant"}),
}
_NO_LIMIT = 10_000


def _rows(shape, extra):
    for conversation in CONVERSATIONS:
        if shape == "messages":
            yield {"messages": conversation, **extra}
        else:
            yield {"prompt": conversation[:-1], "completion": conversation[-1:], **extra}


def _text_cases():
    pairs = [
        ("Say yes:", " yes"),
        ("Who is T", "uomo? Lily"),  # merges reach over the border
        ("a\n", "Tu</s>"),
        ("<s>x ", "y"),
        ("東", "là"),
    ]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    texts = [{"text": text} for text in ("Lily went to Turku.", "Over.</s>", "<s>là")]
    for adds_bos in (False, True):
        named = f"BOS {'added' if adds_bos else 'not added'}"
        tokenizer = {"adds_bos": adds_bos}
        yield f"texts, {named}", tokenizer, rows, {"completion_only": True}, {}
        yield f"texts under the loss, {named}", tokenizer, rows, {}, {"loss_on": "all"}
        yield f"text rows, {named}", tokenizer, texts, {}, {}


def _chat_cases():
    for name, template in TEMPLATES.items():
        for kind, (shape, options, recipe) in _KINDS.items():
            if options.get("assistant_only") and "generation %}" not in template:
                continue
            extra = {"tools": [_TOOL]} if "tools" in name else {}
            yield f"{kind}: {name}", {"chat_template": template}, list(_rows(shape, extra)), options, recipe
    rows = list(_rows("messages", {"tools": []}))
    yield "no tools to show", {"chat_template": _NO_TOOLS}, rows, {}, {"loss_on": "all"}
    thinking = {"chat_template": TEMPLATES["thinks in the last turn"]}
    rows = list(_rows("pair", {"chat_template_kwargs": {"enable_thinking": False}}))
    yield "thinking off, by row", thinking, rows, {"completion_only": True}, {}


def _cut_cases():
    for side, mode in (("right", "keep_start"), ("left", "keep_end")):
        for length in (36, 44, 60):
            options = {"completion_only": True, "mode": mode, "max_length": length}
            recipe = {"truncation_side": side, "max_length": length}
            template = TEMPLATES["ends the sequence where no answer follows"]
            rows = list(_rows("pair", {}))
            yield f"cut on the {side} at {length}", {"chat_template": template}, rows, options, recipe


def cases() -> Iterator[tuple[str, dict[str, Any], list, dict[str, Any], dict[str, Any]]]:
    """Yields name, tokenizer arguments, rows, trainer options and recipe."""
    for name, tokenizer, rows, options, recipe in (*_chat_cases(), *_text_cases(), *_cut_cases()):
        yield name, tokenizer, rows, options, {"max_length": _NO_LIMIT, **recipe}


def trained_by_trl(
    rows: list,
    tokenizer: Any,
    *,
    completion_only: bool = False,
    assistant_only: bool = False,
    chat_template: str | None = None,
    max_length: int | None = None,
    mode: str = "keep_start",
) -> list:
    """What TRL's SFTTrainer trains on: token ids and 1 for each label, of the rows that it keeps."""
    import datasets
    from trl.trainer.sft_trainer import SFTTrainer

    options: Any = types.SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only,
        max_length=max_length,
        truncation_mode=mode,
        shuffle_dataset=False,
    )
    trainer: Any = types.SimpleNamespace(
        _tokenizer=tokenizer, chat_template=chat_template, completion_only_loss=completion_only
    )
    dataset = datasets.Dataset.from_list(rows)
    prepared: Any = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, options, False, None, "train")
    return [[list(row["input_ids"]), [int(label != -100) for label in row["labels"]]] for row in prepared]


def tokenizer_of(arguments):
    """The tokenizer of a case."""
    return byte_tokenizer(**arguments)
