"""The renderer: a page as data, and the same page as one self-contained HTML file, as Markdown, or on a terminal.

Texts may use **bold** and `code`. Everything else in them is shown as it stands, raw HTML too.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from llmeraser_jax import files
from llmeraser_jax.text import show

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
MISSING = "–"
_TERMINAL_WIDTH = 100


def show_number(value: float | int | None) -> str:
    """Three significant digits, thousands separated; a dash for nothing."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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
        pictures: by row and column, what stands under a cell's text.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    emphasised: tuple[int, ...] = ()
    pictures: Mapping[tuple[int, int], tuple[Picture, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.rows} - {len(self.header)}
        if lengths:
            msg = f"Rows of {sorted(lengths)} cells in a table of {len(self.header)} columns."
            raise ValueError(msg)
        strange = [cell for row in self.rows for cell in row if not isinstance(cell, str)]
        if strange:
            msg = f"A table has the cell {show(strange[0])} where a text is expected."
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
        """All pictures, those in details and tables included."""
        return tuple(_pictures(self.blocks))


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Details):
            found += _pictures(block.blocks)
        elif isinstance(block, Table):
            found += [picture for pictures in block.pictures.values() for picture in pictures]
    return found


def write_page(page: Page, directory: str | os.PathLike[str]) -> Path:
    """Writes `report.html`, `report.md` and the pictures into an existing directory; returns the first's path."""
    directory = Path(directory)
    files.atomic_write_text(directory / HTML_FILE, render_html(page))
    files.atomic_write_text(directory / MARKDOWN_FILE, render_markdown(page))
    for picture in page.pictures:
        (directory / picture.name).write_bytes(picture.content)
    return directory / HTML_FILE


def render_markdown(page: Page) -> str:
    """The page in Markdown; pictures are links to PNG files beside it."""
    parts = [f"# {_escape(page.title)}", *map(_markdown, page.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escape(text: str) -> str:
    """One line without raw HTML and without links, which texts of a user's data may hold."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("[", "\\[")


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_escape(block.text)}"
    if isinstance(block, Text):
        return _escape(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"* {_escape(item)}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{_escape(block.title)}]({block.name})"
    if isinstance(block, Details):
        return "\n\n".join([f"**{_escape(block.summary)}**", *map(_markdown, block.blocks)])

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_escape(cell).replace("|", "\\|") for cell in cells) + " |"

    def with_pictures(written: str, row: int) -> str:
        """The pictures of a row at its end, since a cell's text is escaped."""
        links = [f"![{_escape(p.title)}]({p.name})" for (k, _), shown in block.pictures.items() if k == row
                 for p in shown]  # fmt: skip
        return f"{written.removesuffix(' |')} {' '.join(links)} |" if links else written

    rows = [tuple(f"**{cell}**" if cell else "" for cell in row) if k in block.emphasised else row
            for k, row in enumerate(block.rows)]  # fmt: skip
    body = [with_pictures(line(row), k) for k, row in enumerate(rows)]
    return "\n".join([line(block.header), "|" + "---|" * len(block.header), *body])


def render_text(blocks: Sequence[Block]) -> str:
    """Blocks for a terminal: tables in columns, wide ones in parts; pictures and what is folded are left out."""
    return "\n\n".join(filter(None, map(_text, blocks))) + "\n"


def _text(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{block.text}\n{('=' if block.level < 3 else '-') * len(block.text)}"
    if isinstance(block, Text | Bullets):
        lines = [block.text] if isinstance(block, Text) else [f"* {item}" for item in block.items]
        plain = [re.sub(r"\*\*(.+?)\*\*|`([^`]+)`", lambda m: m[1] or m[2], line) for line in lines]
        return "\n".join(textwrap.fill(_printable(line), _TERMINAL_WIDTH, subsequent_indent="  ") for line in plain)
    if not isinstance(block, Table):
        return ""
    columns = [[_printable(cell) for cell in column] for column in zip(block.header, *block.rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    parts: list[list[int]] = [[]]
    for place in range(1, len(columns)):
        if parts[-1] and widths[0] + sum(widths[k] + 2 for k in [*parts[-1], place]) > _TERMINAL_WIDTH:
            parts.append([])
        parts[-1].append(place)

    def line(row: int, part: Sequence[int]) -> str:
        cells = [columns[0][row].ljust(widths[0])]
        cells += [columns[k][row].ljust(widths[k]) if _holds_words(columns[k]) else columns[k][row].rjust(widths[k])
                  for k in part]  # fmt: skip
        return "  ".join(cells).rstrip()

    return "\n\n".join("\n".join(line(row, part) for row in range(len(columns[0]))) for part in parts)


def _printable(text: str) -> str:
    """One line without control characters, so that no text of a user's data steers the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


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
        width = f' width="{_width(block.content)}"' if _width(block.content) else ""
        return f"<figure>{_image(block, width)}<figcaption>{_inline(block.title)}</figcaption></figure>"
    if isinstance(block, Details):
        inside = "\n".join(map(_html, block.blocks))
        return f"<details><summary>{_inline(block.summary)}</summary>\n{inside}\n</details>"
    columns = list(zip(block.header, *block.rows, strict=True))
    sides = [' class="words"' if _holds_words(column) else "" for column in columns]
    head = "".join(f"<th{side}>{_inline(cell)}</th>" for side, cell in zip(sides, block.header, strict=True))
    rows = []
    for place, row in enumerate(block.rows):
        style = ' class="reference"' if place in block.emphasised else ""
        shown = [
            _inline(cell) + "".join(f"<br>{_image(p)}" for p in block.pictures.get((place, column), ()))
            for column, cell in enumerate(row)
        ]
        cells = "".join(
            f"<td{sides[column]}>{cell}</td>" if column else f"<th>{cell}</th>" for column, cell in enumerate(shown)
        )
        rows.append(f"<tr{style}>{cells}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _image(picture: Picture, width: str = "") -> str:
    data = base64.b64encode(picture.content).decode("ascii")
    return f'<img alt="{html.escape(picture.title)}"{width} src="data:image/png;base64,{data}">'


def _holds_words(column: Sequence[str]) -> bool:
    """Columns that hold words stand left, numbers right."""
    return any(len(re.findall(r"[A-Za-z]{2,}", cell)) >= 2 or re.fullmatch(r"[A-Za-z .]{4,}", cell)
               for cell in column[1:])  # fmt: skip


def _width(png: bytes) -> int:
    """Pixels on the page: plots are drawn for print, at half as many again."""
    return round(int.from_bytes(png[16:20]) / 1.5) if png[:4] == b"\x89PNG" and len(png) >= 20 else 0


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1c1c1c; font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
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
table { overflow-wrap: normal; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; border-bottom: 1px solid #e2e2e2; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; font-weight: 600; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; white-space: nowrap; }
th.words, td.words { text-align: left; }
td.words { white-space: normal; min-width: 8rem; max-width: 26rem; }
tr.reference { background: #eaf5f0; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #555; max-width: 54rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
"""
