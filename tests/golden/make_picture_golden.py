"""Makes `pictures.npz` and `pictures.json` beside it: `python -m tests.golden.make_picture_golden` at the root."""

import json
import pathlib

import numpy as np

from tests.golden.picture_cases import PROCESSORS, pictures, pixels_by_transformers, rows, tokens_by_transformers

PIXELS = pathlib.Path(__file__).parent / "pictures.npz"
TOKENS = PIXELS.with_suffix(".json")


def main():
    """Writes the pixels of every processor and picture, and the tokens of every row."""
    made = {
        f"{processor}/{name}": pixels_by_transformers(options, content)
        for processor, options in PROCESSORS.items()
        for name, content in pictures().items()
    }
    np.savez_compressed(PIXELS, allow_pickle=False, **made)
    tokens = {name: tokens_by_transformers(row) for name, row, _ in rows()}
    TOKENS.write_text(json.dumps(tokens, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
