"""Isolated packing: TRL's packed batch has the loss, in transformers, of the same rows unpacked here."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from llmeraser_jax.data import BucketShape, EncodedExample, Recipe, TokenDataset  # noqa: E402
from llmeraser_jax.losses import gradient_sum, lm_objective, loss_sum  # noqa: E402
from llmeraser_jax.models import load_model  # noqa: E402
from tests.golden.cases import CASES  # noqa: E402
from tests.models.tiny import random_lora  # noqa: E402

LENGTHS = (5, 9, 7, 4, 11, 6)


def test_a_packed_batch_is_the_token_mean_of_its_rows(tmp_path):
    from datasets import Dataset
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from tests.torch_parity import reference

    theirs = reference.build(CASES["llama_gqa_tied_llama3_rope"])
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, model.config.vocab_size, length).astype(np.int32) for length in LENGTHS]
    starts = [length // 2 for length in LENGTHS]

    labels = [[-100] * start + row[start:].tolist() for start, row in zip(starts, rows, strict=True)]
    columns = {"input_ids": [row.tolist() for row in rows], "labels": labels}
    packed = pack_dataset(Dataset.from_dict(columns), 16, "bfd")
    assert len(packed) < len(rows)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(packed))
    # What flash attention does with these positions: a row begins where they do, and sees itself alone.
    of_row = torch.cumsum(batch["position_ids"][0] == 0, 0)
    seen = torch.tril(of_row[:, None] == of_row[None, :])
    isolated = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = float(theirs(**{**batch, "attention_mask": isolated}).loss)
        across = float(theirs(**{**batch, "attention_mask": torch.ones_like(batch["input_ids"])}).loss)
    assert abs(across - expected) > 0.01  # packing with attention across rows is another sum

    recipe = Recipe.from_mapping(
        {"template": "plain", "response_prefix": "", "add_bos": False, "reduction": "token", "packing": "isolated"}
    )
    encoded = [
        EncodedExample(str(k), row, start, np.arange(len(row)) >= start)
        for k, (row, start) in enumerate(zip(rows, starts, strict=True))
    ]
    mean_tokens = float(np.mean([example.num_targets for example in encoded]))
    dataset = TokenDataset(encoded, recipe, buckets=[BucketShape(time=16, response=8)], normalizer=mean_tokens)
    stack = dataset.stack(np.arange(len(rows)), np.full(len(rows), 1 / len(rows)), chunk_size=3)
    objective = lm_objective(model.apply, model.base, l2=0.0)
    lora = model.init_lora(jax.random.key(0), random_lora(model).config)  # leaves the base as it is
    assert float(loss_sum(objective, lora, stack)) == pytest.approx(expected, rel=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient_sum(objective, lora, stack)))
