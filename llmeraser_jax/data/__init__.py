"""Data: examples, prompt templates, tokens with a loss mask, length buckets, and request files."""

from llmeraser_jax.data.arrays import ArrayExamples
from llmeraser_jax.data.encoding import (
    BucketShape,
    TokenDataset,
    choose_buckets,
    encode_examples,
)
from llmeraser_jax.data.examples import DataError, Example, content_hash, load_examples, save_examples
from llmeraser_jax.data.pictures import Picture, PicturePlaces, PictureProcessor, attach_places, places_of
from llmeraser_jax.data.preview import marked_text
from llmeraser_jax.data.requests import (
    Action,
    Request,
    RequestError,
    apply_requests,
    edited_example,
    load_requests,
    parse_requests,
    request_to_json,
    save_requests,
)
from llmeraser_jax.data.similarity import find_look_alikes
from llmeraser_jax.data.templates import Recipe
from llmeraser_jax.data.token_subsets import TokenSubsets, align_tokens
from llmeraser_jax.data.tokens import EncodedExample, turn_ends

__all__ = [
    "Action",
    "ArrayExamples",
    "BucketShape",
    "DataError",
    "EncodedExample",
    "Example",
    "Picture",
    "PicturePlaces",
    "PictureProcessor",
    "Recipe",
    "Request",
    "RequestError",
    "TokenDataset",
    "TokenSubsets",
    "align_tokens",
    "apply_requests",
    "attach_places",
    "choose_buckets",
    "content_hash",
    "edited_example",
    "encode_examples",
    "find_look_alikes",
    "load_examples",
    "load_requests",
    "marked_text",
    "parse_requests",
    "places_of",
    "request_to_json",
    "save_examples",
    "save_requests",
    "turn_ends",
]
