"""Conversations as their template renders them: the whole text, and where in it each assistant turn lies.

Nothing is assembled from parts. The tokens are those of the whole rendering; renderings of its beginnings only
serve to find the turns in it.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from llmeraser_jax.data.examples import Example
from llmeraser_jax.data.limits import limited
from llmeraser_jax.data.pictures import PICTURE_MARK, places_of
from llmeraser_jax.data.templates import Recipe
from llmeraser_jax.text import one_line, show

Turns = Sequence[tuple[str, str]]  # (role, content)

_GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Two contents that share neither beginning nor end: what renderings with them share stands around the content.
_STAND_INS = ("Xaver", "Yvonne")
_DATE_DIRECTIVES = "aAbBdejmyYuwUVWGFDxHIMSpfcXZz"
_SHOWN_CHARACTERS = 400
# Of one rendering; a template is a program, which need not end.
_MOST_SECONDS, _MOST_BYTES, _MOST_CHARACTERS = 10.0, 2**31, 20_000_000


@dataclasses.dataclass(frozen=True)
class RenderedConversation:
    """A conversation with its response, as text.

    Attributes:
        text: all of it.
        prompt: what the template writes of the turns before the response, with its generation prompt.
        ends_turn: whether the template writes anything but white space after the response.
    """

    text: str
    prompt: str
    ends_turn: bool


class ChatRenderer:
    """Renders examples by a chat template, with the arguments that recipe and row state.

    Args:
        recipe: resolved, of template "chat".
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any):
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._in_parts: dict[bool, bool] = {}  # whether there are pictures -> whether contents are given as parts
        self._prologue = "" if recipe.date is None else _fixed_date(datetime.date.fromisoformat(recipe.date))

    def render(self, example: Example) -> RenderedConversation:
        """The whole conversation.

        Raises:
            ValueError: the template refuses it, or shows the query in another way where the response follows; the
                message names the example.
        """
        turns = conversation_of(example)
        text = self._render(example, (*turns, ("assistant", example.response)))
        prompt = self._render(example, turns, generate=True)
        _require_query_before(example, prompt, text, turns)
        stripped = example.response.strip()
        after = text[text.rindex(stripped) + len(stripped) :] if stripped in text else "?"
        return RenderedConversation(text, prompt, bool(after.strip()))

    def shows_response(self, example: Example, rendered: RenderedConversation) -> bool:
        """Whether the response stands in the rendering as it stands in the data, outer white space aside."""
        return example.response.strip() in rendered.text

    def has_markers(self, example: Example) -> bool:
        """Whether the template marks by itself what the assistant writes."""
        return _GENERATION_MARKER.search(self._template(example)) is not None

    def marked_tokens(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of the whole conversation, and 1 for each that stands between generation markers."""
        turns = (*conversation_of(example), ("assistant", example.response))
        out = self._apply(example, turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), list(out["assistant_masks"])

    def turn_spans(self, example: Example, rendered: RenderedConversation) -> list[tuple[int, int]]:
        """Where in the rendering the assistant's turns lie, from their first character to their end's.

        Raises:
            ValueError: a turn that cannot be told from the renderings; both are shown.
        """
        text = rendered.text
        turns = (*conversation_of(example), ("assistant", example.response))
        spans = []
        for k, (role, _) in enumerate(turns[:-1]):
            if role != "assistant":
                continue
            prompt = self._render(example, turns[:k], generate=True)
            _require_query_before(example, prompt, text, turns[:k])
            start = _common_prefix(prompt, text)
            so_far = self._render(example, turns[: k + 1])
            if text.startswith(so_far):
                end = len(so_far)
            else:
                after = self._after_content(example, turns, k)
                closing = self._after_content(example, turns[: k + 1], k)
                if not text.endswith(after):
                    raise ValueError(_both(example, f"turn {k} is rendered in two ways", so_far, text))
                ending = self._shared_tokens(after, closing)
                end = len(text) - len(after) + len(ending)
                if end <= start or (closing.strip() and not ending.strip()):
                    raise ValueError(_both(example, f"turn {k} ends otherwise than a last turn", so_far, text))
            spans.append((start, end))
        return [*spans, (_common_prefix(rendered.prompt, text), len(text))]

    def _after_content(self, example: Example, turns: Turns, k: int) -> str:
        """What the template writes after turn `k`'s content."""
        one, other = (
            self._render(example, (*turns[:k], ("assistant", content), *turns[k + 1 :])) for content in _STAND_INS
        )
        shared = _common_prefix(one[::-1], other[::-1])
        return one[len(one) - shared :]

    def _shared_tokens(self, one: str, other: str) -> str:
        """The text of the tokens that two texts begin with alike."""
        encoded = self._tokenizer([one, other], add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(*encoded["input_ids"], encoded["offset_mapping"][0], strict=False)
        alike = [end for a, b, (_, end) in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        return one[: alike[-1]] if alike else ""

    def _template(self, example: Example) -> str:
        tools = json.loads(example.tools) if example.tools else None
        return self._prologue + self._tokenizer.get_chat_template(self._recipe.chat_template, tools)

    def _render(self, example: Example, turns: Turns, *, generate: bool = False) -> str:
        return self._apply(example, turns, tokenize=False, add_generation_prompt=generate)

    def _contents_in_parts(self, example: Example) -> bool:
        """Whether the template of a model that sees takes parts: where it can with pictures, else where it must."""
        if places_of(self._tokenizer) is None:
            return False
        has_pictures = bool(example.images)
        if has_pictures not in self._in_parts:
            turns = (*conversation_of(example), ("assistant", example.response))

            def shown(in_parts: bool) -> bool:
                try:
                    text = self._render_with(example, turns, in_parts=in_parts, tokenize=False)
                except ValueError:
                    return False
                if "'type':" in text and in_parts:  # a list that was written out
                    return False
                return example.response.strip() in text and text.count(PICTURE_MARK) == len(example.images)

            self._in_parts[has_pictures] = shown(True) if has_pictures else not shown(False) and shown(True)
        return self._in_parts[has_pictures]

    def _apply(self, example: Example, turns: Turns, **arguments: Any) -> Any:
        return self._render_with(example, turns, in_parts=self._contents_in_parts(example), **arguments)

    def _render_with(self, example: Example, turns: Turns, *, in_parts: bool, **arguments: Any) -> Any:
        stated = json.loads(example.chat_template_kwargs) if example.chat_template_kwargs else {}
        try:
            with limited("It", seconds=_MOST_SECONDS, num_bytes=_MOST_BYTES):
                rendered = self._tokenizer.apply_chat_template(
                    [
                        {"role": role, "content": _parts(content) if in_parts else content}
                        for role, content in turns
                    ],
                    tools=json.loads(example.tools) if example.tools else None,
                    chat_template=self._template(example),
                    **{**self._recipe.chat_template_kwargs, **stated},
                    **arguments,
                )
        except (
            TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError,
            MemoryError,
        ) as error:  # fmt: skip
            told = str(error) or type(error).__name__
            msg = f"Example {show(example.id)}: the chat template refuses it: {one_line(told, 500)}"
            raise ValueError(msg) from error
        if isinstance(rendered, str) and len(rendered) > _MOST_CHARACTERS:
            msg = f"Example {show(example.id)}: the chat template writes {len(rendered)} characters; it blows up."
            raise ValueError(msg)
        return rendered


def conversation_of(example: Example) -> tuple[tuple[str, str], ...]:
    """The turns before the response; a query of another format is one user message.

    Raises:
        ValueError: the example is a text without turns.
    """
    if example.format == "text":
        msg = f"Example {example.id!r} is one text without turns. Use template = 'none'."
        raise ValueError(msg)
    if example.format == "messages":
        return example.messages
    return (("user", "\n\n".join(part for part in (example.instruction, example.input) if part)),)


def _parts(content: str) -> list[dict[str, str]]:
    """A content as parts. A line break beside a picture's mark is the mark's, as LLaVA's data have it."""
    parts: list[dict[str, str]] = []
    texts = content.split(PICTURE_MARK)
    for k, text in enumerate(texts):
        text = text.removeprefix("\n") if k else text
        text = text if k == len(texts) - 1 else text.removesuffix("\n")
        parts += [{"type": "image"}] if k else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _require_query_before(example: Example, prompt: str, text: str, turns: Turns) -> None:
    """Refuses a rendering whose turns before the response differ from those that a prompt shows."""
    query = turns[-1][1].strip() if turns else ""
    shown_until = prompt.rfind(query) + len(query) if query and query in prompt else 0
    if _common_prefix(prompt, text) < shown_until:
        raise ValueError(_both(example, "the whole conversation does not begin with its prompt", prompt, text))


def _both(example: Example, what: str, one: str, other: str) -> str:
    """An error's words, with the two texts from just before where they part."""
    begin = max(_common_prefix(one, other) - _SHOWN_CHARACTERS // 2, 0)
    shown = [("..." if begin else "") + text[begin : begin + _SHOWN_CHARACTERS] for text in (one, other)]
    return (
        f"Example {example.id!r}: by this chat template {what}, so what is under the loss is not known: "
        f"{shown[0]!r} against {shown[1]!r}. State a chat_template that renders both alike, or has generation "
        "markers."
    )


def _common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length  # they agree up to low, and part before high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


def _fixed_date(date: datetime.date) -> str:
    """Template text that makes `strftime_now` tell this date, at midnight."""
    moment = datetime.datetime.combine(date, datetime.time())
    values = {f"%{letter}": moment.strftime(f"%{letter}") for letter in _DATE_DIRECTIVES}
    values |= {f"%-{letter}": str(int(moment.strftime(f"%{letter}"))) for letter in "dmyHIjMSUW"}
    replaced = "".join(f" | replace({name!r}, {value!r})" for name, value in values.items())
    # The plus sign keeps a line break that the template may begin with.
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro +%}"
