"""Two tokenizers small enough to read: one token per word, and one per character with a word-start mark."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "Q",
    "A",
    "red",
    "blue",
    "green",
    "is",
    "it",
    "yes",
    "no",
    ":",
    "user",
    "bot",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} bot :{% endif %}"
)


ADD_BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


@pytest.fixture
def word_tokenizer():
    """Words split at white space; ids are positions in WORDS. Adds BOS, as Llama's does."""
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = ADD_BOS
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def mark_tokenizer():
    """BPE on "▁"-marked words, as sentencepiece does: every text gets a mark in front unless it has one."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", "y", "e", "s", "ye", "yes", "▁yes", "a", ":", "a:"]
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("a", ":")]
    inner = Tokenizer(models.BPE({p: k for k, p in enumerate(pieces)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    inner.post_processor = ADD_BOS
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
