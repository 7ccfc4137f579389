import numpy as np
import pytest

from llmeraser_jax.convert import (
    BASE_TABLES,
    PEFT_TABLE,
    TRANSPOSE,
    Rule,
    SafetensorsSource,
    Table,
    export_tensors,
    import_tensors,
    write_safetensors,
)
from llmeraser_jax.models import ModelConfig, base_shapes
from tests.golden.cases import CASES

TABLE = Table((Rule("a.{layer}.w", "layers/w", TRANSPOSE), Rule("head", "head")), ignored=(r"junk\.\d+",))


def test_a_literal_table_maps_both_ways(tmp_path):
    leaves = {
        "layers/w": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        "head": np.array([5.0], np.float32),
    }
    tensors = export_tensors(TABLE, leaves)
    assert list(tensors) == ["a.0.w", "a.1.w", "head"]
    np.testing.assert_array_equal(tensors["a.1.w"], [[6, 9], [7, 10], [8, 11]])
    assert tensors["a.1.w"].flags.c_contiguous
    write_safetensors(tmp_path / "t", {**tensors, "junk.3": np.zeros(1, np.float32)})
    source = SafetensorsSource.from_file(tmp_path / "t")
    back = import_tensors(TABLE, source, {p: x.shape for p, x in leaves.items()}, "float32", "t")
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(back[path], leaf)


def test_a_transposed_view_is_written_as_it_looks(tmp_path):
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_safetensors(tmp_path / "t", {"x": view})
    np.testing.assert_array_equal(SafetensorsSource.from_file(tmp_path / "t").read("x"), view)


def test_names_match_as_a_whole():
    target = TABLE.match("a.12.w")
    assert target is not None
    assert (target.path, target.place) == ("layers/w", (12,))
    for name in ("a.12.w.bias", "xa.1.w", "a.01.w", "a..w", "a-1-w"):
        assert TABLE.match(name) is None


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_base_parameter_has_a_name_that_leads_back_to_it(case):
    config = ModelConfig.from_hf(case)
    table = BASE_TABLES[config.model_type]
    seen = set()
    for name, target, _ in table.entries(base_shapes(config)):
        assert table.match(name) == target
        assert name not in seen
        seen.add(name)


def test_adapter_names_lead_back_to_their_leaves():
    shapes = {rule.path: (2, 3, 4) for rule in PEFT_TABLE.rules}
    entries = list(PEFT_TABLE.entries(shapes))
    assert len(entries) == 2 * 2 * 9
    assert all(PEFT_TABLE.match(name) == target for name, target, _ in entries)


def test_a_table_without_an_inverse_is_refused():
    with pytest.raises(ValueError, match="path head"):
        Table((Rule("a", "head"), Rule("b", "head")))


def test_a_leaf_that_no_rule_writes_is_refused():
    with pytest.raises(ValueError, match="'tail'"):
        export_tensors(TABLE, {"tail": np.zeros(1)})


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros((2, 3), np.float32)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
