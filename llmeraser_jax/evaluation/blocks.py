"""A page as data: headings, sentences, tables, pictures, rendered as one self-contained HTML file or as Markdown.

Texts may use **bold** and `code`; everything else of them is shown as it stands.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Sequence
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title; level 2 is a section, 3 a part of one."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; cells after the first column are numbers where they look like one.

    Attributes:
        header: one cell per column.
        rows: as long as the header each.
        emphasised: rows that are set off, by place: what the others are compared with.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    emphasised: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.rows} - {len(self.header)}
        if lengths:
            msg = f"Rows of {sorted(lengths)} cells in a table of {len(self.header)} columns."
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG with a sentence that says what it shows."""

    name: str
    title: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class Details:
    """Blocks behind a line that opens them; in Markdown they simply follow it."""

    summary: str
    blocks: tuple[Block, ...]


Block: TypeAlias = Heading | Text | Bullets | Table | Picture | Details


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything of one page.

    Attributes:
        title: its heading.
        blocks: in order.
    """

    title: str
    blocks: tuple[Block, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, those in details included."""
        return tuple(_pictures(self.blocks))


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Details):
            found += _pictures(block.blocks)
    return found


def render_markdown(page: Page) -> str:
    """The page in Markdown; pictures are links to PNG files beside it."""
    parts = [f"# {page.title}", *(_markdown(block) for block in page.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Bullets):
        return "\n".join(f"* {item}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{block.title}]({block.name})"
    if isinstance(block, Details):
        return "\n\n".join([f"**{block.summary}**", *map(_markdown, block.blocks)])

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rows = [tuple(f"**{cell}**" if cell else "" for cell in row) if k in block.emphasised else row
            for k, row in enumerate(block.rows)]  # fmt: skip
    return "\n".join([line(block.header), "|" + "---|" * len(block.header), *map(line, rows)])


def render_html(page: Page) -> str:
    """The page as one HTML file that refers to nothing outside itself: style inline, pictures as data."""
    body = "\n".join(_html(block) for block in page.blocks)
    title = html.escape(page.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _inline(text: str) -> str:
    escaped = html.escape(text)
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.content).decode("ascii")
        width = f' width="{_width(block.content)}"' if _width(block.content) else ""
        return (
            f'<figure><img alt="{html.escape(block.title)}"{width} src="data:image/png;base64,{data}">'
            f"<figcaption>{_inline(block.title)}</figcaption></figure>"
        )
    if isinstance(block, Details):
        inside = "\n".join(map(_html, block.blocks))
        return f"<details><summary>{_inline(block.summary)}</summary>\n{inside}\n</details>"
    columns = list(zip(block.header, *block.rows, strict=True))
    sides = [' class="words"' if any(map(_is_words, column[1:])) else "" for column in columns]
    head = "".join(f"<th{side}>{_inline(cell)}</th>" for side, cell in zip(sides, block.header, strict=True))
    rows = []
    for place, row in enumerate(block.rows):
        style = ' class="reference"' if place in block.emphasised else ""
        cells = "".join(
            f"<td{sides[column]}>{_inline(cell)}</td>" if column else f"<th>{_inline(cell)}</th>"
            for column, cell in enumerate(row)
        )
        rows.append(f"<tr{style}>{cells}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _is_words(cell: str) -> bool:
    """Columns that hold words stand left, numbers right."""
    return len(re.findall(r"[A-Za-z]{2,}", cell)) >= 2 or bool(re.fullmatch(r"[A-Za-z ]{4,}", cell))


def _width(png: bytes) -> int:
    """Pixels on the page: plots are drawn for print, at half as many again."""
    return round(int.from_bytes(png[16:20]) / 1.5) if png[:4] == b"\x89PNG" and len(png) >= 20 else 0


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1c1c1c; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 2px solid #ddd; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p, ul { max-width: 54rem; margin: .5rem 0; }
ul { padding-left: 1.3rem; }
li { margin: .2rem 0; }
code { font: .92em ui-monospace, monospace; background: #f2f2f2; padding: 0 .25em; border-radius: 3px;
  overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .65rem; border-bottom: 1px solid #e2e2e2; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; font-weight: 600; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; }
th.words, td.words { text-align: left; }
td.words { white-space: normal; max-width: 26rem; }
tr.reference { background: #eaf5f0; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #555; max-width: 54rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
"""
