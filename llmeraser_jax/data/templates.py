"""How text becomes a prompt, and everything else that fixes tokens and loss: the recipe.

The recipe is what must be known of an adapter's training before any of its examples can be erased, so it is
validated in full, refuses what it does not know, and is stored resolved (no "auto" left).
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jinja2 import TemplateError

from llmeraser_jax.data.examples import FORMATS, Example

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclasses.dataclass(frozen=True)
class _NamedTemplate:
    with_input: str
    without_input: str
    response_prefix: str  # text that belongs between prompt and response, tokenised with the response


_TEMPLATES = {
    "plain": _NamedTemplate("{instruction}\n{input}\n", "{instruction}\n", ""),
    "alpaca": _NamedTemplate(_ALPACA_WITH_INPUT, _ALPACA_WITHOUT_INPUT, ""),
    # The space goes to the response: vocabularies hold " Yes" as one token.
    "qa": _NamedTemplate("Question: {instruction}\n{input}\nAnswer:", "Question: {instruction}\nAnswer:", " "),
}
TEMPLATES: tuple[str, ...] = ("auto", *_TEMPLATES, "chat")
_TEMPLATE_OF_FORMAT = {"instruction": "alpaca", "question": "qa", "prompt": "plain", "messages": "chat"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an example becomes tokens and a loss.

    The sequence is `[BOS] prompt + (response_prefix + response) [EOS]`, right-padded.

    Attributes:
        template: "plain" (`{instruction}\\n{input}\\n`), "alpaca" (also TALLRec's), "qa" (`Question:
            ...\\nAnswer:` and a response that begins with a space), "chat" (the tokenizer's chat template
            with its generation prompt), any format string that contains `{instruction}` (and `{input}`), or
            "auto": by the columns of the data, instruction -> alpaca, question -> qa, prompt -> plain,
            messages -> chat.
        response_prefix: text between prompt and response, tokenised with the response and under the loss;
            None is the template's own: a space for "qa", else nothing.
        tokenization: "separate" tokenises prompt and response apart and concatenates, so that the response's
            tokens never depend on the prompt; "joint" tokenises the whole text, as many training scripts do,
            and a token that straddles the border counts as response.
        add_bos: begin with BOS; None is: if the tokenizer has one, and never for "chat", whose template
            writes its own. A BOS that the prompt already begins with is not doubled.
        add_eos: end the response with EOS, under the loss.
        loss_on: "response", or "all" for every token but the first.
        reduction: "example" averages each example over its loss tokens; "token" divides each example's summed
            loss by the training set's mean number of loss tokens. That is a constant, fixed at training and
            stored, so that the objective stays a sum over examples when some are removed.
        max_length: tokens in a sequence at most, BOS and EOS included.
        truncation_side: which end of a prompt that does not fit is cut ("left" keeps BOS), or "error". The
            response is never cut.
        packing: must be False: packed sequences mix examples, so none can be removed by itself.
    """

    template: str = "auto"
    response_prefix: str | None = None
    tokenization: Literal["separate", "joint"] = "separate"
    add_bos: bool | None = None
    add_eos: bool = True
    loss_on: Literal["response", "all"] = "response"
    reduction: Literal["example", "token"] = "example"
    max_length: int = 512
    truncation_side: Literal["left", "right", "error"] = "left"
    packing: bool = False

    def __post_init__(self):
        _check_fields({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from parsed TOML or JSON.

        Raises:
            ValueError: a key that is no field, or a value that a field does not take.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in mapping if key not in known)
        if unknown:
            msg = f"unknown recipe key {', '.join(map(repr, unknown))}; the keys are {', '.join(known)}."
            raise ValueError(msg)
        _check_fields(mapping)
        return cls(**mapping)

    def to_mapping(self) -> dict[str, Any]:
        """The inverse of `from_mapping`; fields that are None are left out, since TOML has no null."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to be decided by data or tokenizer."""
        return self.template != "auto" and self.response_prefix is not None and self.add_bos is not None

    def resolve(self, data_format: str, tokenizer: Any) -> Recipe:
        """Settles what is left open by the data's columns and the tokenizer; store the result.

        Args:
            data_format: `Example.format` of the data.
            tokenizer: a Hugging Face tokenizer.

        Raises:
            ValueError: the tokenizer lacks the BOS, EOS, chat template or offsets that the recipe asks for.
        """
        if data_format not in FORMATS:
            msg = f"data format is {data_format!r}; it must be one of {', '.join(FORMATS)}."
            raise ValueError(msg)
        template = _TEMPLATE_OF_FORMAT[data_format] if self.template == "auto" else self.template
        prefix = self.response_prefix
        if prefix is None:
            prefix = _TEMPLATES[template].response_prefix if template in _TEMPLATES else ""
        add_bos = self.add_bos
        if add_bos is None:
            add_bos = tokenizer.bos_token_id is not None and template != "chat"
        if add_bos and tokenizer.bos_token_id is None:
            msg = "add_bos is true, but the tokenizer has no BOS token; set add_bos = false."
            raise ValueError(msg)
        if self.add_eos and tokenizer.eos_token_id is None:
            msg = "add_eos is true, but the tokenizer has no EOS token; set add_eos = false."
            raise ValueError(msg)
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            msg = "template is 'chat', but the tokenizer has no chat template; name another template."
            raise ValueError(msg)
        if self.tokenization == "joint" and not getattr(tokenizer, "is_fast", False):
            msg = "tokenization is 'joint', which needs a fast tokenizer (character offsets); use 'separate'."
            raise ValueError(msg)
        return dataclasses.replace(self, template=template, response_prefix=prefix, add_bos=add_bos)


_CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Recipe).items() if get_origin(hint) is Literal}


def _check_fields(values: Mapping[str, Any]) -> None:
    """Refuses a value that a field of `Recipe` does not take, of whatever type a parsed file brings."""
    for name, value in values.items():
        problem = None
        if name in _CHOICES and value not in _CHOICES[name]:
            problem = f"it must be one of {', '.join(_CHOICES[name])}"
        elif (name == "template" and not isinstance(value, str)) or (
            name == "response_prefix" and not isinstance(value, str | None)
        ):
            problem = "it must be a string"
        elif name in ("add_bos", "add_eos", "packing") and not isinstance(value, bool):
            problem = None if (name == "add_bos" and value is None) else "it must be true or false"
        elif name == "max_length" and (type(value) is not int or value < 2):
            problem = "it must be an integer of at least 2 tokens"
        if problem:
            msg = f"{name} is {value!r}; {problem}."
            raise ValueError(msg)
    if values.get("template", "auto") not in TEMPLATES:
        _check_format_string(values["template"])
    if values.get("packing"):
        msg = (
            "packing is true, which is not supported: a packed sequence lets examples see each other, "
            "so none can be removed by itself. Set packing = false; an adapter trained with packing "
            "cannot be erased from."
        )
        raise ValueError(msg)


def make_prompt_renderer(recipe: Recipe, tokenizer: Any) -> Callable[[Example], str]:
    """The function that writes an example's prompt: everything before the response, BOS left out.

    Args:
        recipe: a resolved recipe.
        tokenizer: for "chat" only.

    Returns:
        A function that raises ValueError, naming the example, where the template would lose part of it, or where a
        chat template refuses it.
    """
    if recipe.template == "auto":
        msg = "template is 'auto'; resolve the recipe first."
        raise ValueError(msg)
    if recipe.template == "chat":

        def render_chat(example: Example) -> str:
            try:
                return tokenizer.apply_chat_template(
                    _conversation(example), tokenize=False, add_generation_prompt=True
                )
            except TemplateError as error:
                msg = f"Example {example.id!r}: the tokenizer's chat template refuses it: {error}"
                raise ValueError(msg) from error

        return render_chat
    template = _TEMPLATES.get(recipe.template, _NamedTemplate(recipe.template, recipe.template, ""))
    shows_input = "input" in _fields_of(template.with_input)

    def render(example: Example) -> str:
        instruction = example.instruction
        if example.format == "messages":
            if len(example.messages) != 1:
                msg = (
                    f"Example {example.id!r} has {len(example.messages)} messages before the response; "
                    "template "
                    f"{recipe.template!r} shows one. Use template = 'chat'."
                )
                raise ValueError(msg)
            instruction = example.query
        if example.input and not shows_input:
            msg = (
                f"Example {example.id!r} has an input, which template {recipe.template!r} leaves out; add "
                f"{{input}}."
            )
            raise ValueError(msg)
        text = template.with_input if example.input else template.without_input
        return text.format(instruction=instruction, input=example.input)

    return render


def _conversation(example: Example) -> list[dict[str, str]]:
    """Messages for the chat template; other formats are one user message."""
    if example.format == "messages":
        return [{"role": role, "content": content} for role, content in example.messages]
    parts = [part for part in (example.instruction, example.input) if part]
    return [{"role": "user", "content": "\n\n".join(parts)}]


def _fields_of(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _check_format_string(template: str) -> None:
    names = ", ".join(TEMPLATES)
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        msg = f"template {template!r} is not a format string ({error}); write literal braces as {{{{ and }}}}."
        raise ValueError(msg) from error
    fields = {name for _, name, _, _ in pieces if name is not None}
    if "instruction" not in fields:
        msg = f"template is {template!r}; it must be one of {names}, or a format string with {{instruction}}."
        raise ValueError(msg)
    unknown = sorted(fields - {"instruction", "input"})
    if unknown or any(spec or conversion for _, _, spec, conversion in pieces):
        msg = (
            f"template {template!r} may hold the plain fields {{instruction}} and {{input}} only"
            + (f", not {', '.join(map(repr, unknown))}" if unknown else "")
            + "; write literal braces as {{ and }}."
        )
        raise ValueError(msg)
