"""The experiment at full size: Llama-2-7B and all rows, on one large GPU or a TPU slice.

python -m experiments.tallrec_movie.full --base LLAMA_2_7B --data DIR --workdir DIR [--mesh data=4,model=2]
"""

from __future__ import annotations

import dataclasses

import tyro

from experiments import full_size
from experiments.tallrec_movie.main import TallrecConfig, main
from llmeraser_jax.data import Recipe
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.unlearning import EraseConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullTallrecConfig(TallrecConfig):
    """`TallrecConfig` with the settings of `experiments.full_size`.

    Attributes:
        mesh: devices, e.g. data=4,model=2; empty is one device.
    """

    num_rows: int = 8000
    rows_per_user: int = 8000
    max_length: int = 1024
    rank: int = full_size.LORA.rank
    epochs: int = full_size.TRAIN.epochs
    learning_rate: float = full_size.TRAIN.learning_rate
    l2: float = full_size.TRAIN.l2
    mesh: str = ""

    @property
    def recipe(self) -> Recipe:
        """TALLRec's own prompt, Alpaca's, with EOS."""
        return Recipe(template="alpaca", max_length=self.max_length)

    @property
    def lora(self) -> LoraConfig:
        """The adapter."""
        return dataclasses.replace(full_size.LORA, rank=self.rank)

    @property
    def train(self) -> TrainConfig:
        """Its training."""
        return dataclasses.replace(
            full_size.TRAIN, epochs=self.epochs, learning_rate=self.learning_rate, l2=self.l2, seed=self.seed
        )

    @property
    def erase(self) -> EraseConfig:
        """What the package's own ways share."""
        return dataclasses.replace(full_size.ERASE, l2=self.l2)


def run(config: FullTallrecConfig) -> None:
    """`main` in bfloat16 on the mesh."""
    main(config, dtype=full_size.DTYPE, mesh=config.mesh)


if __name__ == "__main__":
    run(tyro.cli(FullTallrecConfig))
