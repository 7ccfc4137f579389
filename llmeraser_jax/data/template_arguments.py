"""What a recipe, or a row, may pass to a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Arguments of `apply_chat_template` that the package sets itself.
_RESERVED_ARGUMENTS = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "sanitize_control_tokens",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


def problem_of_template_arguments(value: Any) -> str | None:
    """What is wrong with arguments for a chat template, in words; None where nothing is."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return "it must be a table of names and values"
    reserved = sorted(_RESERVED_ARGUMENTS.intersection(value))
    if reserved:
        return f"{', '.join(reserved)} cannot be set there"
    try:
        json.dumps(dict(value))
    except (TypeError, ValueError):
        return "its values must be what JSON holds"
    return None
