"""The experiment at full size: Llama-2-7B and all rows, on one large GPU or a TPU slice.

python -m experiments.tallrec_movie.full --base LLAMA_2_7B --data DIR --workdir DIR [--mesh data=4,model=2]
"""

from __future__ import annotations

import dataclasses

import tyro

from experiments import full_size
from experiments.tallrec_movie.main import TallrecConfig, main
from llmeraser_jax.data import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullTallrecConfig(full_size.FullSize, TallrecConfig):
    """`TallrecConfig` with the settings of `experiments.full_size`."""

    num_rows: int = 8000
    rows_per_user: int = 8000
    max_length: int = 1024

    @property
    def recipe(self) -> Recipe:
        """TALLRec's own prompt, Alpaca's, with EOS."""
        return Recipe(template="alpaca", truncate="prompt", max_length=self.max_length)


def run(config: FullTallrecConfig) -> None:
    """`main` in bfloat16 on the mesh."""
    main(config, dtype=full_size.DTYPE, mesh=config.mesh)


if __name__ == "__main__":
    run(tyro.cli(FullTallrecConfig))
