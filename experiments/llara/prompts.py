"""Owns the wording: rows as prompts, in the sentences of LLaRA's released templates.

The sentences are those of `prompt/{movie,artist,game}.txt` in github.com/ljy0ustc/LLaRA, with one difference: where
they say "10" they say so whatever the number of candidates is (20 in its own scripts); here it is the number given.
LLaRA ends the target with a line break and no end-of-sequence token; so do responses here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.llara.data import Domain
from llmeraser_jax.data import Example

TERMINATOR = "\n"

TEMPLATES: Mapping[Domain, tuple[str, str, str]] = {
    "movie": (
        "This user has watched {history} in the previous. Please predict the next movie this user will watch. "
        "Choose the answer from the following {count} movie titles: {candidates}. Answer:",
        "This user has watched {history} in the previous. Given the following {count} movie titles: {candidates}, "
        "recommend one movie for this user to watch next. The movie title you recommend is:",
        "The visit history of this user is: {history}. Recommend a next movie for this user to watch from the "
        "following movie title set: {candidates}. The recommendation should contain one movie title only. "
        "Recommendation:",
    ),
    "artist": (
        "This user has listened to {history} in the previous. Please predict the next music artist this user will "
        "listen to. The artist name candidates are {candidates}. Choose only one artist from the candidates. "
        "The answer is",
        "This user has listened to {history} in the previous. Given the following {count} music artist names, "
        "{candidates}, recommend one artist for this user to listen to next. The artist name you recommend is",
        "The listening history of this user is {history}. Recommend the next music artist for this user to listen "
        "to from the following artist name set, {candidates}. The recommendation should contain one artist's name "
        "only. The recommendation is",
    ),
    "game": (
        "This user has played {history} in the previous. Please predict the next game this user will play. "
        "The game title candidates are {candidates}. Choose only one game from the candidates. The answer is",
        "This user has played {history} in the previous. Given the following {count} game titles, {candidates}, "
        "recommend one game for this user to play next. The game title you recommend is",
        "The visit history of this user is {history}. Recommend a next game for this user to play from the "
        "following game title set, {candidates}. The recommendation should contain one game title only. "
        "The recommendation is",
    ),
}


def item_text(item: int) -> str:
    """What stands for an item's embedding in a hybrid prompt; `hybrid.with_item_tokens` makes it one token."""
    return f"<|item_{item}|>"


def make_prompt(
    template: str,
    titles: Mapping[int, str],
    history: Sequence[int],
    candidates: Sequence[int],
    *,
    hybrid: bool = False,
) -> str:
    """The query.

    Args:
        template: with fields `{history}` and `{candidates}`, and perhaps `{count}`.
        titles: of the items.
        history: earliest first.
        candidates: in the order in which they are shown.
        hybrid: every title is followed by its item's embedding, as LLaRA's `[HistoryEmb]` and `[CansEmb]`.
    """

    def listed(items: Sequence[int]) -> str:
        return ", ".join(f"{titles[i]} {item_text(i)}" if hybrid else titles[i] for i in items)

    return template.format(history=listed(history), candidates=listed(candidates), count=len(candidates))


def make_response(title: str) -> str:
    """The response: the title and the end of its line."""
    return title + TERMINATOR


def make_example(id_: str, prompt: str, title: str) -> Example:
    """The row as the library's example: its query is the whole prompt."""
    return Example(id=id_, instruction=prompt, response=make_response(title), format="prompt")
