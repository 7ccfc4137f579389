"""How text becomes a prompt, and everything else that fixes tokens and loss: the recipe.

The recipe is what must be known of an adapter's training before any of its examples can be erased, so it is
validated in full, refuses what it does not know, and is stored resolved (no "auto" left).
"""

from __future__ import annotations

import dataclasses
import datetime
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from llmeraser_jax import files
from llmeraser_jax.data.examples import FORMATS, Example
from llmeraser_jax.data.template_arguments import problem_of_template_arguments
from llmeraser_jax.text import show

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.{note}\n\n"
    "### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.{note}\n\n"
    "### Instruction:\n{{instruction}}\n\n### Response:\n"
)
_TALLREC_NOTE = "  # noqa: E501"  # a linter's comment that stands inside the string of TALLRec's own script


@dataclasses.dataclass(frozen=True)
class _NamedTemplate:
    with_input: str
    without_input: str
    response_prefix: str  # text that belongs between prompt and response, tokenised with the response


def _alpaca(note: str) -> _NamedTemplate:
    return _NamedTemplate(_ALPACA_WITH_INPUT.format(note=note), _ALPACA_WITHOUT_INPUT.format(note=note), "")


_TEMPLATES = {
    "none": _NamedTemplate("{instruction}", "{instruction}", ""),
    "plain": _NamedTemplate("{instruction}\n{input}\n", "{instruction}\n", ""),
    "alpaca": _alpaca(""),
    "tallrec": _alpaca(_TALLREC_NOTE),
    # The space goes to the response: vocabularies hold " Yes" as one token.
    "qa": _NamedTemplate("Question: {instruction}\n{input}\nAnswer:", "Question: {instruction}\nAnswer:", " "),
}
TEMPLATES: tuple[str, ...] = ("auto", *_TEMPLATES, "chat")
_TEMPLATE_OF_FORMAT = {
    "instruction": "alpaca",
    "question": "qa",
    "prompt": "none",
    "messages": "chat",
    "text": "none",
}
_TOKENISED_TOGETHER = ("none", "chat")
_OWN_DATE = "date_string"  # of the templates that ask for the date only where this argument is absent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an example becomes tokens and a loss.

    With "chat" the sequence is what the tokenizer's template renders of the whole conversation; else it is
    `[BOS] prompt + (response_prefix + response) [EOS]`.

    Attributes:
        template: "chat" (the tokenizer's chat template), "none" (the prompt as it stands, then the response),
            "plain" (`{instruction}\\n{input}\\n`), "alpaca", "tallrec" (alpaca's with the `  # noqa: E501` of
            TALLRec's script in it), "qa" (`Question: ...\\nAnswer:` and a response that begins with a space), any
            format string that contains `{instruction}` (and `{input}`), or "auto": by the columns of the data,
            instruction -> alpaca, question -> qa, prompt and text -> none, messages -> chat.
        response_prefix: text between prompt and response, tokenised with the response and under the loss;
            None is the template's own: a space for "qa", else nothing.
        tokenization: "joint" tokenises prompt and response as one text, as TRL does; the response begins where
            that text's tokens and the prompt's own part. "separate" tokenises the two apart and concatenates, so
            that the response's tokens never depend on the prompt. None is "joint" for "none" and "chat", else
            "separate".
        add_bos: begin with BOS, if the text does not begin with it; None is as the tokenizer does, and for "chat"
            as the template does.
        add_eos: end the response with EOS, under the loss, if it does not end with it, or, for "chat", if the
            template writes no turn end. None is true, and for "chat" false.
        loss_on: "response" (the last turn, from where it parts from the prompt), "assistant" (every assistant
            turn; what stands between `{% generation %}` markers where the template has them), or "all".
        reduction: "example" averages each example over its loss tokens; "token" divides each example's summed
            loss by the training set's mean number of loss tokens. That is a constant, fixed at training and
            stored, so that the objective stays a sum over examples when some are removed.
        max_length: tokens in a sequence at most, BOS and EOS included.
        truncation_side: which end of a sequence that does not fit is cut: "right" is TRL's keep_start, "left" its
            keep_end; or "error". An example without a token under the loss left is dropped, as TRL does.
        packing: False, or "isolated": several examples in a sequence, none of which saw another, averaged over
            tokens (`reduction` is "token"). That is the sum over examples that unpacked ones have, so it changes
            nothing here. True, with attention across examples, is refused: none can be removed by itself.
        truncate: what is cut: the whole "sequence", answer or BOS included, or the "prompt" alone, which keeps BOS.
        chat_template: a chat template to use in place of the tokenizer's: its text, or a file (.jinja, .j2).
        chat_template_kwargs: arguments for the chat template, such as `enable_thinking`; a row's own column of
            this name goes first.
        date: YYYY-MM-DD, what a chat template that writes today's date is told; None is today where it asks.
    """

    template: str = "auto"
    response_prefix: str | None = None
    tokenization: Literal["separate", "joint"] | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    loss_on: Literal["response", "assistant", "all"] = "response"
    reduction: Literal["example", "token"] = "example"
    max_length: int = 512
    truncation_side: Literal["left", "right", "error"] = "left"
    packing: bool | Literal["isolated"] = False
    truncate: Literal["sequence", "prompt"] = "sequence"
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    date: str | None = None

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
            msg = f"unknown recipe key {', '.join(map(show, unknown))}; the keys are {', '.join(known)}."
            raise ValueError(msg)
        _check_fields(mapping)
        values: dict[str, Any] = dict(mapping)
        if isinstance(values.get("date"), datetime.date):  # TOML has dates of its own
            values["date"] = values["date"].isoformat()
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """The inverse of `from_mapping`; what is None or empty is left out, since TOML has no null."""
        values = dataclasses.asdict(self)
        if not values["chat_template_kwargs"]:
            del values["chat_template_kwargs"]
        return {name: value for name, value in values.items() if value is not None}

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to be decided by data or tokenizer."""
        left = (self.response_prefix, self.tokenization, self.add_bos, self.add_eos)
        return self.template != "auto" and None not in left

    def resolve(self, data_format: str, tokenizer: Any) -> Recipe:
        """Settles what is left open by the data's columns, the tokenizer and the day; store the result.

        Args:
            data_format: `Example.format` of the data.
            tokenizer: a Hugging Face tokenizer.

        Raises:
            ValueError: the tokenizer lacks the BOS, EOS or chat template that the recipe asks for.
            FileNotFoundError: `chat_template` names a file that is not there.
        """
        if data_format not in FORMATS:
            msg = f"data format is {data_format!r}; it must be one of {', '.join(FORMATS)}."
            raise ValueError(msg)
        template = _TEMPLATE_OF_FORMAT[data_format] if self.template == "auto" else self.template
        chat = template == "chat"
        prefix = self.response_prefix
        if prefix is None:
            prefix = _TEMPLATES[template].response_prefix if template in _TEMPLATES else ""
        tokenization = self.tokenization or ("joint" if template in _TOKENISED_TOGETHER else "separate")
        add_bos = self.add_bos
        if add_bos is None:
            add_bos = not chat and tokenizer_adds_bos(tokenizer)
        add_eos = not chat if self.add_eos is None else self.add_eos
        origin = getattr(tokenizer, "name_or_path", "")
        named = f"the tokenizer in {origin}" if origin else "the tokenizer"
        problem = None
        if add_bos and tokenizer.bos_token_id is None:
            problem = f"add_bos is true, but {named} has no BOS token; set add_bos = false"
        elif add_eos and tokenizer.eos_token_id is None:
            problem = f"add_eos is true, but {named} has no EOS token; set add_eos = false"
        elif chat and prefix:
            problem = f"response_prefix is {prefix!r}, but a chat template writes what comes before a response"
        elif chat and tokenization == "separate":
            problem = "tokenization is 'separate', but a conversation is rendered and tokenised as a whole"
        elif chat and not (self.chat_template or getattr(tokenizer, "chat_template", None)):
            problem = f"template is 'chat', but {named} has no chat template; state chat_template or another"
        elif not chat and (self.chat_template or self.chat_template_kwargs or self.date):
            problem = (
                f"chat_template, chat_template_kwargs and date act on 'chat' only, and template is {template!r}"
            )
        elif not chat and self.loss_on == "assistant":
            problem = f"loss_on is 'assistant', but template {template!r} has no turns; use 'response' or 'all'"
        if problem:
            msg = f"The recipe cannot be used: {problem}."
            raise ValueError(msg)
        resolved = dataclasses.replace(
            self,
            template=template,
            response_prefix=prefix,
            tokenization=tokenization,
            add_bos=add_bos,
            add_eos=add_eos,
            chat_template=_read_chat_template(self.chat_template),
        )
        if chat and self.date is None and resolved.asks_for_date(tokenizer):
            resolved = dataclasses.replace(resolved, date=datetime.date.today().isoformat())
        return resolved

    def asks_for_date(self, tokenizer: Any) -> bool:
        """Whether the chat template writes the current date, unless it is told one."""
        text = self.chat_template or getattr(tokenizer, "chat_template", None) or ""
        return "strftime_now" in str(text) and _OWN_DATE not in self.chat_template_kwargs


_CHOICES = {
    name: tuple(choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str))
    for name, hint in get_type_hints(Recipe).items()
}
_CHOICES = {name: choices for name, choices in _CHOICES.items() if choices and name != "packing"}
_OPTIONAL = frozenset(name for name, hint in get_type_hints(Recipe).items() if type(None) in get_args(hint))


def tokenizer_adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS in front of a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def _read_chat_template(stated: str | None) -> str | None:
    """The text of a template, which may be stated as a file."""
    if stated is None or "\n" in stated or "{" in stated or not stated.endswith((".jinja", ".j2")):
        return stated
    if not Path(stated).is_file():
        msg = f"The recipe cannot be used: chat_template is {show(stated)}, and there is no such file."
        raise FileNotFoundError(msg)
    with files.reading(stated):
        return Path(stated).read_text(encoding="utf-8")


def _check_fields(values: Mapping[str, Any]) -> None:
    """Refuses a value that a field of `Recipe` does not take, of whatever type a parsed file brings."""
    for name, value in values.items():
        problem = None
        if value is None and name in _OPTIONAL:
            continue
        if name in _CHOICES and value not in _CHOICES[name]:
            problem = f"it must be one of {', '.join(_CHOICES[name])}"
        elif name in ("template", "response_prefix", "chat_template") and not isinstance(value, str):
            problem = "it must be a string"
        elif name in ("add_bos", "add_eos") and not isinstance(value, bool):
            problem = "it must be true or false"
        elif name == "packing" and value != "isolated" and not isinstance(value, bool):
            problem = 'it must be false, or "isolated"'
        elif name == "max_length" and (type(value) is not int or value < 2):
            problem = "it must be an integer of at least 2 tokens"
        elif name == "chat_template_kwargs":
            problem = problem_of_template_arguments(value)
        elif name == "date" and not _is_date(value):
            problem = "it must be a date, YYYY-MM-DD"
        if problem:
            msg = f"{name} is {show(value)}; {problem}."
            raise ValueError(msg)
    if values.get("template", "auto") not in TEMPLATES:
        _check_format_string(values["template"])
    if values.get("packing") is True:
        msg = (
            "packing is true, which is not supported: examples in a packed sequence see each other, so none can be "
            "removed by itself, and an adapter trained so cannot be erased from. Where attention kept them apart, "
            'state packing = "isolated".'
        )
        raise ValueError(msg)
    if values.get("packing") and values.get("reduction", "example") != "token":
        msg = (
            'packing is "isolated" and reduction is "example"; packed sequences are averaged over their tokens: '
            'state reduction = "token".'
        )
        raise ValueError(msg)


def _is_date(value: Any) -> bool:
    if type(value) is datetime.date:
        return True
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def make_prompt_renderer(recipe: Recipe) -> Callable[[Example], str]:
    """The function that writes an example's prompt by a template other than "chat": everything before the response.

    Args:
        recipe: a resolved recipe.

    Returns:
        A function that raises ValueError, naming the example, where the template would lose part of it.
    """
    if recipe.template in ("auto", "chat"):
        msg = f"template is {recipe.template!r}; it must be resolved, and no conversation's."
        raise ValueError(msg)
    template = _TEMPLATES.get(recipe.template, _NamedTemplate(recipe.template, recipe.template, ""))
    shows_input = "input" in _fields_of(template.with_input)

    def render(example: Example) -> str:
        instruction, problem = example.instruction, None
        if example.format == "messages":
            instruction = example.query
            if len(example.messages) != 1:
                problem = (
                    f"has {len(example.messages)} messages before the response; template {recipe.template!r} shows "
                    "one. Use template = 'chat'"
                )
            elif example.tools or example.chat_template_kwargs:
                column = "tools" if example.tools else "chat_template_kwargs"
                problem = f"has {column}, which template {recipe.template!r} leaves out. Use template = 'chat'"
        elif example.format == "text" and recipe.template != "none":
            problem = f"is one text without a prompt; template {recipe.template!r} needs one. Use template = 'none'"
        if example.input and not shows_input:
            problem = f"has an input, which template {recipe.template!r} leaves out; add {{input}}"
        if problem:
            msg = f"Example {example.id!r} {problem}."
            raise ValueError(msg)
        text = template.with_input if example.input else template.without_input
        return text.format(instruction=instruction, input=example.input)

    return render


def _fields_of(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _check_format_string(template: str) -> None:
    names = ", ".join(TEMPLATES)
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        shown = show(template, 200)
        msg = f"template {shown} is not a format string ({error}); write literal braces as {{{{ and }}}}."
        raise ValueError(msg) from error
    fields = {name for _, name, _, _ in pieces if name is not None}
    if "instruction" not in fields:
        shown = show(template, 200)
        msg = f"template is {shown}; it must be one of {names}, or a format string with {{instruction}}."
        raise ValueError(msg)
    unknown = sorted(fields - {"instruction", "input"})
    if unknown or any(spec or conversion for _, _, spec, conversion in pieces):
        msg = (
            f"template {show(template, 200)} may hold the plain fields {{instruction}} and {{input}} only"
            + (f", not {', '.join(map(repr, unknown))}" if unknown else "")
            + "; write literal braces as {{ and }}."
        )
        raise ValueError(msg)
