"""The blocks of NOTEBOOK.md run, and what a notebook shows of objects and errors is short."""

import re
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import llmeraser_jax as le
from llmeraser_jax import cli
from llmeraser_jax.losses import example_losses
from tests.training import tiny

PAGE = Path(le.__file__).parent / "NOTEBOOK.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's blocks define, run in order beside a base model."""
    work = tmp_path_factory.mktemp("notebook")
    tiny.save_tiny_model(work / "base")
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for k, block in enumerate(blocks):
            exec(compile(block, f"{PAGE.name}, block {k}", "exec"), names)
            names[f"after {k}"] = dict(names)
    return names


def losses_of(objective, params, rows, indices):
    stack = rows.stack(np.array(indices), np.ones(len(indices)), chunk_size=4)
    return np.asarray(example_losses(objective, params, stack))


def test_the_adapter_in_memory_is_erased_from(page):
    then = page["after 1"]
    before, receipt = then["lora"], then["receipt"]
    assert receipt.counts == {"remove": 1, "modify_query": 0, "correct_response": 1}
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, then["new_lora"])
    assert max(map(float, jax.tree.leaves(moved))) > 1e-3


def test_a_model_without_a_root_takes_the_path_and_lands_near_retraining(page):
    objective, rows, problem, result = (page[name] for name in ("objective", "all_rows", "problem", "result"))
    assert result.receipt.method.startswith("path") and result.receipt.left == 0
    kept = [*problem.retained, *problem.wanted]
    x, y = (rows.arrays[name][kept] for name in ("x", "y"))

    @jax.jit
    def descend(lora):
        loss = jax.grad(lambda p: objective.data_losses(p, {"x": x, "y": y}).mean() + objective.l2_loss(p))(lora)
        return jax.tree.map(lambda p, g: p - 0.3 * g, lora, loss)

    retrained = page["lora"]
    for _ in range(1000):
        retrained = descend(retrained)
    before, erased, right = (
        losses_of(objective, p, rows, [3, 7, 40]) for p in (page["lora"], result.params, retrained)
    )
    assert np.all(np.abs(erased - right) < 0.25 * np.abs(before - right)), (before, erased, right)


def test_what_a_notebook_shows_is_short(page):
    then = page["after 1"]
    shown = [then[name] for name in ("result", "receipt", "task", "model", "data", "lora")]
    shown += [page[name] for name in ("problem", "all_rows", "result")] + [then["task"].problem]
    for value in shown:
        text = repr(value)
        assert text.startswith(type(value).__name__) and len(text) < 500 and "\n" not in text, text


def test_a_bar_is_shown_on_request_and_in_a_notebook(monkeypatch, capsys):
    from llmeraser_jax import tracking

    with tracking.progress(description="erasing", total=2) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    with tracking.progress(description="erasing", total=2, shown=True) as bar:
        bar.update()
    assert "erasing" in capsys.readouterr().err

    class ZMQInteractiveShell:
        """What IPython calls the shell of a notebook."""

    class Module:
        get_ipython = staticmethod(ZMQInteractiveShell)

    monkeypatch.setitem(tracking.sys.modules, "IPython", Module)
    assert tracking.is_watched()


def test_requests_come_from_tables_too():
    examples = le.load_examples(tiny.rows(8))
    requests = [
        {"id": "r1", "action": "remove"},
        {"id": "r4", "action": "modify_query", "instruction": "colour of s11"},
        {"id": "r7", "action": "correct_response", "response": "red"},
    ]
    expected = le.load_requests(requests, examples)
    frame = pd.DataFrame(requests)
    assert le.load_requests(frame, examples) == expected
    import datasets

    assert le.load_requests(datasets.Dataset.from_pandas(frame), examples) == expected
    chat = le.load_examples(
        [{"messages": [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]}] * 1
        + [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    )
    turns = pd.DataFrame(
        [{"id": 0, "action": "modify_query", "turn": 0, "query": "z"}, {"id": 1, "action": "remove"}]
    )
    assert [request.turn for request in le.load_requests(turns, chat)] == [0, None]


def test_an_exception_has_the_consoles_text(capsys):
    examples = le.load_examples(tiny.rows(3))
    with pytest.raises(le.RequestError) as error:
        le.load_requests([{"id": "r99", "action": "remove"}], examples)
    assert str(error.value).startswith("the list given: line 1: unknown id 'r99'")
    assert cli.guarded(lambda: len(le.load_requests([{"id": "r99", "action": "remove"}], examples))) == 1
    assert capsys.readouterr().err == f"llmeraser: error: {error.value}\n"


@pytest.mark.parametrize("arrays", [{}, {"x": np.zeros((0, 2))}, {"x": np.zeros((3, 2)), "y": np.zeros(2)}, 3.0])
def test_arrays_that_are_no_rows_are_refused(arrays):
    with pytest.raises(ValueError, match="rows; give at least one"):
        le.ArrayExamples(arrays)


def test_array_rows_lie_in_the_order_that_was_asked_for():
    rows = le.ArrayExamples({"x": np.arange(10.0)[:, None]})
    stack = rows.stack(np.array([7, 2, 5]), np.array([1.0, 2.0, 3.0]), chunk_size=2)
    assert stack.batches[0]["x"].tolist() == [[[7.0], [2.0]], [[5.0], [7.0]]]
    assert stack.weights[0].tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert stack.places is not None and stack.places[0].tolist() == [[0, 1], [2, -1]]
