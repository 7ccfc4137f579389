"""Every named example before and after: a picture and a table, for evaluations and for studies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from llmeraser_jax.evaluation.blocks import Block, Details, Picture, Table, Text
from llmeraser_jax.evaluation.overview_plots import plot_each_example
from llmeraser_jax.evaluation.page import show_number

Quantity: TypeAlias = Literal["forget", "wanted"]
Losses: TypeAlias = Sequence[float | None]

_SHOWN_EXAMPLES = 200
_OPEN_EXAMPLES = 30  # a longer table of examples is folded
_TITLES: Mapping[Quantity, tuple[str, str]] = {
    "forget": ("as it was trained on", "it should rise to the retrained value, not beyond"),
    "wanted": ("as it was wanted", "it should fall to the retrained value"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedLosses:
    """Losses of the named examples, in nats per response token; None is not known.

    Attributes:
        quantity: of the pairs as they were trained on, or as they were wanted.
        ids: of the examples.
        requests: what was asked for each, in words.
        before: under the model as trained.
        models: under each model, by what it is called.
        retrained: under the retrained models, their mean; None without one.
    """

    quantity: Quantity
    ids: Sequence[str]
    requests: Sequence[str]
    before: Losses
    models: Mapping[str, Losses]
    retrained: Losses | None


def example_blocks(
    losses: NamedLosses, picture: str, *, pictured: Sequence[str], left: str, fold: bool = False
) -> list[Block]:
    """A picture and a table of them.

    Args:
        losses: of at least one example.
        picture: name of the PNG file.
        pictured: names of the models in it.
        left: where the examples are that a long table leaves out.
        fold: fold the table whatever its length.
    """
    title, meaning = _TITLES[losses.quantity]
    retrained = [None] * len(losses.ids) if losses.retrained is None else losses.retrained
    drawn = plot_each_example(
        {
            name: [
                {"before": before, "unlearned": after, "retrained": target}
                for before, after, target in zip(losses.before, losses.models[name], retrained, strict=True)
            ]
            for name in pictured
        }
    )
    blocks: list[Block] = []
    if drawn is not None:
        blocks.append(
            Picture(
                picture,
                f"Loss of each example {title}: under the retrained models (across) and under the model "
                "(up). On the line nothing is left to do; below it the answer is more probable than "
                "retraining would make it, above it less.",
                drawn,
            )
        )
    columns = [losses.before, *losses.models.values(), *([] if losses.retrained is None else [losses.retrained])]
    rows = zip(losses.ids, losses.requests, *columns, strict=True)
    table = tuple((name, asked, *map(show_number, cells)) for name, asked, *cells in rows)
    target = () if losses.retrained is None else ("retrained (mean)",)
    shown = Table(("id", "request", "before", *losses.models, *target), table[:_SHOWN_EXAMPLES])
    num_left = len(table) - len(shown.rows)
    note = f" The other {num_left} are in {left}." if num_left else ""
    text = Text(f"Loss (nats per token) of each named example **{title}**: {meaning}.{note}")
    if fold or len(shown.rows) > _OPEN_EXAMPLES:
        return [*blocks, text, Details(f"{len(shown.rows)} examples, {title}", (shown,))]
    return [*blocks, text, shown]
