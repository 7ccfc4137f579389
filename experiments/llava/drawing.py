"""Owns the pictures that the project draws, and the questions about them.

A picture has 32 x 32 pixels in four quarters. In one kind a quarter holds a shape, and a multiple-choice question
asks for it; every shape has a usual colour, which most pictures keep to. In the other two quarters hold different
shapes, and a yes/no question asks whether one is left of the other, above it, or of the same colour.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 40)}
LETTERS = ("A", "B", "C", "D")
RELATIONS = ("left-of", "above", "same-colour-as")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
YES_NO = ("yes", "no")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape of a picture, by places in `SHAPES`, `COLOURS` and the quarters (0 to 3, row by row)."""

    shape: int
    colour: int
    quarter: int

    @property
    def words(self) -> str:
        """Its description."""
        return f"{list(COLOURS)[self.colour]} {SHAPES[self.shape]} {PLACES[self.quarter]}"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a picture of these shapes, its right answer, all possible ones, and the one that a picture's
    unusual colour suggests; empty where there is none."""

    shapes: tuple[Shape, ...]
    text: str
    answer: str
    choices: tuple[str, ...]
    by_colour: str = ""


def draw(shapes: tuple[Shape, ...], rng: np.random.Generator) -> np.ndarray:
    """Pixels [32, 32, 3] of a picture: shapes of radius 5 to 7 on noisy grey."""
    pixels = rng.integers(95, 160, (SIZE, SIZE, 3)).astype(np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    for one in shapes:
        radius = rng.uniform(5, 7)
        dy, dx = y - (8 + 16 * (one.quarter // 2)) + 0.5, x - (8 + 16 * (one.quarter % 2)) + 0.5
        inside = (
            dx**2 + dy**2 <= radius**2,
            np.maximum(abs(dx), abs(dy)) <= 0.85 * radius,
            (abs(dy) <= radius) & (abs(dx) <= (dy + radius) / 2),
            (np.minimum(abs(dx), abs(dy)) <= 1.6) & (np.maximum(abs(dx), abs(dy)) <= radius),
        )[one.shape]
        pixels[inside] = tuple(COLOURS.values())[one.colour]
    return pixels


def class_question(rng: np.random.Generator, tied: float) -> Question:
    """A multiple-choice question on a picture whose colour is the shape's usual one with probability `tied`."""
    shape = int(rng.integers(4))
    colour = shape if rng.random() < tied else (shape + int(rng.integers(1, 4))) % 4
    choices = " ".join(f"{letter} {name}" for letter, name in zip(LETTERS, SHAPES, strict=True))
    shapes = (Shape(shape, colour, int(rng.integers(4))),)
    by_colour = "" if colour == shape else LETTERS[colour]
    return Question(shapes, f"which shape ? {choices}", LETTERS[shape], LETTERS, by_colour)


def relation_question(rng: np.random.Generator, shown: tuple[Shape, ...] = ()) -> Question:
    """A yes/no question: on a new picture, for which each answer is right half of the time, or on the one shown."""
    relation, wanted = int(rng.integers(3)), bool(rng.integers(2))
    while True:
        kinds, quarters, colours = rng.permutation(4), rng.permutation(4), rng.integers(0, 4, 2)
        shapes = tuple(Shape(int(kinds[k]), int(colours[k]), int(quarters[k])) for k in range(2))
        if _holds(shapes)[relation] == wanted:
            break
    shapes = shown or shapes
    text = f"is {SHAPES[shapes[0].shape]} {RELATIONS[relation]} {SHAPES[shapes[1].shape]} ?"
    return Question(shapes, text, YES_NO[not _holds(shapes)[relation]], YES_NO)


def _holds(shapes: tuple[Shape, ...]) -> tuple[bool, ...]:
    """Which of `RELATIONS` hold between two shapes."""
    one, two = shapes
    return one.quarter % 2 < two.quarter % 2, one.quarter // 2 < two.quarter // 2, one.colour == two.colour


def as_png(pixels: np.ndarray) -> bytes:
    """A picture as a file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
