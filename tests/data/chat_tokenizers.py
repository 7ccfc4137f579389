"""Tokenizers for chat templates: bytes, a few merges, and every control token that the template writes."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_CONTROL = re.compile(
    r"<\|[^|<>{}\s]+\|>|<｜[^｜<>{}]+｜>|</?(?:start|end)_of_[a-z]+>|<turn\||<\|turn>|<think>|</think>"
)
_MERGES = [("l", "y"), ("i", "ly"), ("T", "u"), ("Ċ", "Ċ"), ("Ġ", "L"), ("ĠL", "ily")]


def byte_tokenizer(chat_template=None, *, bos="<s>", eos="</s>", adds_bos=False, tokens=()):
    """A byte-level BPE.

    Args:
        chat_template: its text; its control tokens become tokens.
        bos: beginning of sequence, or None.
        eos: end of sequence.
        adds_bos: whether the tokenizer puts BOS in front of a text by itself.
        tokens: more control tokens.
    """
    control = dict.fromkeys([t for t in (bos, eos) if t] + list(tokens) + _CONTROL.findall(chat_template or ""))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*control, *alphabet, *("".join(pair) for pair in _MERGES)]
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(models.BPE(vocabulary, _MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(control))
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, chat_template=chat_template
    )
