"""From files to files through the console script's entry point: fine-tune, erase, chain, retrain, compare."""

import dataclasses
import hashlib
import itertools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import trees
from llmeraser_jax.cli import main
from llmeraser_jax.curvature import CURVATURES, DatasetCurvature
from llmeraser_jax.data import load_examples, load_requests, parse_requests
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.lora import Lora
from llmeraser_jax.losses import example_losses, gradient_sum, lm_objective
from llmeraser_jax.models import load_model
from llmeraser_jax.parallel import make_mesh, shard_base
from llmeraser_jax.runs import load_run
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.unlearning import CurvatureSpec, Step, UnlearningTask, erase, make_problem
from llmeraser_jax.unlearning import job as unlearning_job
from llmeraser_jax.unlearning.known_rows import KNOWN_ROWS_FILE
from llmeraser_jax.unlearning.receipt import bf16_survival
from tests.deletion.traces import traces_in, traces_of
from tests.dense import DenseOperator, materialise
from tests.training import tiny

REQUESTS = [
    {"id": "r1", "action": "remove"},
    {"id": "r4", "action": "modify_query", "instruction": "colour of s11"},
    {"id": "r7", "action": "correct_response", "response": "red"},
]
# The method comes last, with its own flags.
SMALL = ["--sample-size", "4", "--damping", "0.01"]
QUICK = ["--chunk-size", "4", "path", "--num-steps", "3", "--solver", "cg:rtol=0.05,max_steps=4", *SMALL]
MATCHING = ["--chunk-size", "4", "target-matching", "--num-steps", "3", *SMALL]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def run(work):
    """A finished fine-tuning of the tiny model."""
    model = load_model(tiny.save_tiny_model(work / "model"))
    data_path = tiny.write_rows(work / "train.jsonl", tiny.rows())
    write_lines(work / "requests.jsonl", REQUESTS)
    return finetune_run(model, data_path, work / "run", recipe=tiny.RECIPE, lora=tiny.LORA, config=tiny.CONFIG)


@pytest.fixture(scope="module")
def erased(run, work):
    arguments = ["erase", "--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    assert main([*arguments, "--workdir", str(work / "out"), *QUICK]) == 3
    return load_run(work / "out")


@pytest.fixture(scope="module")
def unseen(work):
    return tiny.write_rows(work / "unseen.jsonl", [{**row, "id": "h" + row["id"]} for row in tiny.rows(12)[10:]])


@pytest.fixture(scope="module")
def traces(run):
    """Of what REQUESTS erase or replace."""
    examples = [example for example in run.load_examples() if example.id in ("r1", "r4", "r7")]
    dataset = run.encode(examples, run.load_model().tokenizer)
    return traces_of(examples, ['"colour of s1"', '"colour of s4"', "colour of s7 grey"], dataset)


def test_an_erasure_compiles_few_programs_and_one_of_another_size_none(run, work, unseen, tmp_path):
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(kwargs["fun_name"]))

    def erase_with(name, requests):
        path = write_lines(tmp_path / f"{name}.jsonl", requests)
        arguments = ["--run", str(run.path), "--requests", str(path), "--calibration", str(unseen)]
        status = main(["erase", *arguments, "--workdir", str(tmp_path / name), *MATCHING])
        assert status in (0, 3)
        found = compiled.copy()
        compiled.clear()
        return found

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        first = erase_with("first", REQUESTS)
        second = erase_with(
            "second", [{"id": "r2", "action": "remove"}, {"id": "r5", "action": "remove"}, *REQUESTS]
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert 0 < len(first) <= 24, first
    assert second == []


def test_no_file_and_no_line_of_an_erasure_holds_what_was_erased(run, work, traces, monkeypatch, capfd, tmp_path):
    """Neither texts nor tokens nor hashes without a key; solver states that a kill leaves behind included."""
    monkeypatch.setattr(unlearning_job, "shutil", types.SimpleNamespace(rmtree=lambda *a, **k: None))
    arguments = ["erase", "--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    options = ["--workdir", str(tmp_path / "out"), "--chunk-size", "4", "path", "--num-steps", "1", "--stream"]
    assert main([*arguments, *options, "--solver", "cg:rtol=0.05,max_steps=2", *SMALL]) == 3
    said = capfd.readouterr()
    assert "NOT ARRIVED" in said.out and traces_in((said.out + said.err).encode(), traces) == []
    assert list((tmp_path / "out.solves").rglob("solve.json")) or any((tmp_path / "out.solves").iterdir())
    for name in ("out", "out.solves"):
        assert traces_in(tmp_path / name, traces) == []
    # The search finds what is there: in the data before, and in what an erasure might have written.
    assert len(traces_in(run.data_path.read_bytes(), traces)) == 2
    rows = {row.id: row for row in run.encode(run.load_examples(), run.load_model().tokenizer).encoded}
    assert len(traces_in(json.dumps([rows["r1"].sha256, rows["r7"].tokens.tolist()]).encode(), traces)) == 2
    assert len(traces_in(rows["r7"].tokens.astype("<i8").tobytes(), traces)) == 1


def test_erase_writes_both_adapters_receipt_requests_and_edited_data(run, erased):
    model = run.load_model()
    before, after = run.load_adapter(model), erased.load_adapter(model)
    delta = trees.tree_sub(after, before)
    assert float(trees.tree_norm(delta)) > 0
    name = "adapter_model.safetensors"
    kept = (erased.path / "parent_adapter" / name).read_bytes()
    assert kept == (run.path / "adapter" / name).read_bytes()
    receipt = json.loads((erased.path / "receipt.json").read_text())
    assert receipt["counts"] == {"remove": 1, "modify_query": 1, "correct_response": 1}
    assert receipt["delta_norm"] == pytest.approx(float(trees.tree_norm(delta)), rel=1e-5)
    examples = {example.id: example for example in run.load_examples()}
    edited = {example.id: example for example in erased.load_examples()}
    for named in receipt["named"]:
        assert named["hash_before"] == erased.content_hash(examples[named["id"]])
        expected = None if named["action"] == "remove" else erased.content_hash(edited[named["id"]])
        assert named["hash_after"] == expected
    assert "r1" not in edited and edited["r7"].response == "red" and edited["r4"].instruction == "colour of s11"
    assert receipt["num_examples_after"] == len(edited) == len(examples) - 1


def test_receipt_costs_follow_the_stated_formula(run, erased):
    receipt = json.loads((erased.path / "receipt.json").read_text())
    num_steps, data = len(receipt["steps"]), 4 + 3 + 2
    products = sum(step["iterations"] + 1 + step["negative_curvature"] for step in receipt["steps"])
    cost = receipt["gradient_equivalents"]
    assert cost["rhs"] == pytest.approx(num_steps * (1 + 2 + 2))
    # The primal pass is made once per step, and a product on what it leaves costs 1.
    assert cost["curvature"] == pytest.approx((products + num_steps / 3) * data)
    assert cost["trust_region"] >= num_steps * data - 1e-9
    assert cost["total"] == pytest.approx(cost["rhs"] + cost["curvature"] + cost["trust_region"])


def test_max_steps_is_not_called_convergence_in_the_receipt(erased):
    receipt = json.loads((erased.path / "receipt.json").read_text())
    capped = [step for step in receipt["steps"] if step["iterations"] == 4 and step["residual_history"][-1] > 0.05]
    assert capped, "the test needs a solve that ran into max_steps"
    assert all(step["status"].startswith("not converged") for step in capped)
    assert receipt["solver"]["converged"] is False and receipt["solver"]["status"].startswith("not converged")


def test_rhs_norm_is_that_of_the_gradients_written_out(run, erased):
    model = run.load_model()
    dataset = run.encode(run.load_examples(), model.tokenizer)
    problem = make_problem(model, dataset, load_requests(erased.path / "requests.jsonl", dataset.examples))
    objective = lm_objective(model.apply, model.base, l2=run.train_config.l2)
    lora = run.load_adapter(model)

    def one(index):
        stack = problem.examples.stack(np.array([index]), np.ones(1), chunk_size=1)
        return gradient_sum(objective, lora, stack)

    total = trees.tree_zeros_like(lora)
    for i, j in zip(problem.named, problem.replacements, strict=True):
        total = trees.tree_add(total, one(int(i)))
        if j >= 0:
            total = trees.tree_sub(total, one(int(j)))
    expected = float(trees.tree_norm(total)) / len(dataset)
    receipt = json.loads((erased.path / "receipt.json").read_text())
    assert receipt["rhs_norm"] == pytest.approx(expected, rel=1e-4)


def test_a_request_without_effect_leaves_an_unchanged_adapter_and_a_receipt_that_says_so(run, tmp_path, capsys):
    (run.path / KNOWN_ROWS_FILE).unlink(missing_ok=True)  # its loss is paid for here, not by an earlier test
    requests = write_lines(tmp_path / "requests.jsonl", [{"id": "r1", "action": "remove"}])
    arguments = ["erase", "--run", str(run.path), "--requests", str(requests), "--workdir", str(tmp_path / "out")]
    # Any loss is above this one: the row has been forgotten already.
    assert main([*arguments, "--target-loss", "1e-5", "--chunk-size", "4"]) == 0
    assert "the adapter is unchanged" in capsys.readouterr().out
    out = load_run(tmp_path / "out")
    model = run.load_model()
    before, after = run.load_adapter(model), out.load_adapter(model)
    assert float(trees.tree_norm(trees.tree_sub(after, before))) == 0
    receipt = json.loads((out.path / "receipt.json").read_text())
    assert receipt["complete"] and receipt["steps"] == [] and receipt["validity"] is None
    assert receipt["delta_norm"] == 0 and receipt["bf16_survival"] == 1 and receipt["rhs_norm"] == 0
    assert receipt["gradient_equivalents"]["total"] == pytest.approx(1 / 3)
    # A report over it has a certificate without steps.
    assert main(["report", str(out.path), "--workdir", str(tmp_path / "report")]) == 0
    assert "nothing to solve" in (tmp_path / "report" / "report.md").read_text()


def test_later_requests_see_the_edited_data_and_receipts_chain(erased, work, capsys):
    second = write_lines(work / "second.jsonl", [{"id": "r2", "action": "remove"}])
    arguments = ["erase", "--run", str(erased.path), "--requests", str(second)]
    assert main([*arguments, "--workdir", str(work / "out2"), *QUICK]) == 4
    chained = load_run(work / "out2")
    assert len(chained.receipts) == 2
    digest = hashlib.sha256((erased.path / "receipt.json").read_bytes()).hexdigest()
    assert chained.receipts[0]["sha256"] == digest
    assert {"r1", "r2"}.isdisjoint(chained.data_ids)
    gone = write_lines(work / "gone.jsonl", [{"id": "r1", "action": "remove"}])
    assert main(["erase", "--run", str(erased.path), "--requests", str(gone), "--workdir", str(work / "x")]) == 1
    assert "r1" in capsys.readouterr().err and not (work / "x").exists()


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([{"id": "nobody", "action": "remove"}], "nobody"),
        ([{"id": "r1", "action": "remove"}] * 2, "r1"),
        ([{"id": "r1", "action": "forget"}], "forget"),
        ([{"id": "r7", "action": "correct_response", "response": tiny.rows()[7]["output"]}], "r7"),
        ([], "empty|no request"),
        ([{"id": f"r{k}", "action": "remove"} for k in range(10)], "every|all|remain"),
    ],
)
def test_bad_requests_are_one_clear_error_and_leave_nothing(run, tmp_path, capsys, lines, cause):
    requests = write_lines(tmp_path / "bad.jsonl", lines)
    status = main(["erase", "--run", str(run.path), "--requests", str(requests), "--workdir", str(tmp_path / "o")])
    error = capsys.readouterr().err
    assert status == 1 and "bad.jsonl" in error and not (tmp_path / "o").exists()
    assert re.search(cause, error), error


def test_what_happens_to_an_erasure_that_is_not_complete(run, work, tmp_path, capsys):
    common = ["erase", "--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    assert main([*common, "--workdir", str(tmp_path / "no"), "--on-incomplete", "refuse", *QUICK]) == 3
    said = capsys.readouterr()
    assert "No adapter is written" in said.err and "NOT ARRIVED" in said.out and not (tmp_path / "no").exists()
    assert main([*common, "--workdir", str(tmp_path / "again"), "--fallback", "retrain", *QUICK]) == 0
    assert not (tmp_path / "again.retraining").exists()
    receipt = json.loads((tmp_path / "again" / "receipt.json").read_text())
    assert receipt["method"] == "retrained" and receipt["complete"]
    assert receipt["attempts"][-1].startswith("path: incomplete") or "harmful" in receipt["attempts"][-1]
    # It is the adapter that `retrain` makes, and both are paid for.
    requests = ["--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    assert main(["retrain", *requests, "--workdir", str(tmp_path / "re"), "--seeds", "1"]) == 0
    (retrained,) = (load_run(path) for path in (tmp_path / "re").iterdir())
    model = run.load_model()
    for a, b in zip(
        jax.tree.leaves(load_run(tmp_path / "again").load_adapter(model)),
        jax.tree.leaves(retrained.load_adapter(model)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert receipt["gradient_equivalents"]["total"] > retrained.result["gradient_equivalents"]


def test_an_existing_output_directory_is_refused_and_kept(run, work, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    arguments = ["erase", "--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    assert main([*arguments, "--workdir", str(tmp_path)]) == 1
    assert "kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_evaluate_reports_every_promised_number_with_and_without_retraining(
    run, erased, work, unseen, traces, capsys
):
    common = ["--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    assert main(["retrain", *common, "--workdir", str(work / "re"), "--seeds", "2"]) == 0
    arguments = ["evaluate", "--before", str(run.path), "--after", str(erased.path), "--data", str(unseen)]
    retrained = ["--retrained", str(work / "re")]
    assert main([*arguments, *retrained, "--workdir", str(work / "eval")]) == 0
    report = json.loads((work / "eval" / "report.json").read_text())
    for model in ("before", "unlearned", "retrained"):
        for key in ("forget_loss", "heldout_loss", "heldout_kl_to_retrained"):
            assert isinstance(report["models"][model][key], float)
        assert report["models"][model]["task_metrics"]
    assert {"c*b", "gradient ascent"} == report["models"]["controls"].keys()
    assert report["seed_floor"]["heldout_kl"] == report["models"]["retrained"]["heldout_kl_to_retrained"]
    assert {"forget_loss", "heldout_kl"} <= report["gap_closure"].keys()
    for which in ("unlearn", "retrain"):
        assert report["cost"][which]["seconds"] > 0 and report["cost"][which]["gradient_equivalents"] > 0
    assert {"status", "iterations", "relative_residual", "negative_curvature"} <= report["solver"].keys()
    assert {path.suffix for path in (work / "eval").iterdir()} == {".json", ".html", ".md", ".png"}
    assert not any("texts" in row for row in report["named_examples"])
    assert traces_in(work / "eval", traces) == [] and traces_in(erased.path, traces) == []
    assert main([*arguments, "--show-texts", "--workdir", str(work / "eval_alone")]) == 0
    alone = json.loads((work / "eval_alone" / "report.json").read_text())
    assert alone["gap_closure"]["forget_loss"] is None and alone["gap_closure"]["reason"]["forget_loss"]
    first = alone["named_examples"][0]
    assert first["texts"] == {"query": "colour of s1", "trained": "blue", "wanted_query": None, "wanted": None}
    assert set(first["answers"]["named"]) == {"before", "unlearned"}


def test_what_the_erasing_was_shown_is_no_non_member(run, erased, work, unseen, capsys):
    outside = load_examples(unseen)
    arguments = ["erase", "--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    assert main([*arguments, "--calibration", str(unseen), "--workdir", str(work / "shown"), *MATCHING]) == 3
    receipt = json.loads((work / "shown" / "receipt.json").read_text())
    after = load_run(work / "shown")
    assert receipt["heldout_sha256"] == [after.shown_hash(example) for example in outside]
    assert json.loads((erased.path / "receipt.json").read_text())["heldout_sha256"] == []

    arguments = ["evaluate", "--before", str(run.path), "--after", str(work / "shown")]
    assert main([*arguments, "--data", str(unseen), "--workdir", str(work / "eval_shown")]) == 0
    assert "Name other examples here than to `erase`" in capsys.readouterr().err
    report = json.loads((work / "eval_shown" / "report.json").read_text())
    assert report["heldout"]["nonmembers"] == 0 and report["models"]["before"]["membership_auc"] == {}
    assert "membership inference is not measured" in report["context"]["Held-out data"]
    assert report["models"]["before"]["task_metrics"] and report["models"]["before"]["heldout_loss"] > 0

    rows = [tiny.rows(12)[11], {**tiny.rows(12)[11], "id": "r12", "input": "now"}]
    other = tiny.write_rows(work / "partly.jsonl", [{**row, "id": "x" + row["id"]} for row in rows])
    assert main([*arguments, "--data", str(other), "--workdir", str(work / "eval_partly")]) == 0
    report = json.loads((work / "eval_partly" / "report.json").read_text())
    assert report["heldout"] == {"examples": 2, "nonmembers": 1, "response_positions": 0}
    model = run.load_model()
    dataset, lora = run.encode(run.load_examples(), model.tokenizer), run.load_adapter(model)
    named = [place for place, example in enumerate(dataset.examples) if example.id in ("r1", "r4", "r7")]
    inside = score_examples(model, lora, dataset, np.array(named)).losses
    unknown = score_examples(model, lora, run.encode(load_examples(other)[1:], model.tokenizer)).losses
    auc = report["models"]["before"]["membership_auc"]["loss"]["value"]
    assert auc == pytest.approx(np.mean(inside < unknown))


def test_rows_that_were_trained_on_are_not_held_out(run, erased, work, capsys):
    """Their losses would tell removed rows to stay where they are, and members from members."""
    train = str(work / "train.jsonl")
    arguments = ["erase", "--run", str(run.path), "--requests", str(work / "requests.jsonl")]
    assert main([*arguments, "--calibration", train, "--workdir", str(work / "known"), *MATCHING]) == 1
    assert "was trained on all its 10 examples" in capsys.readouterr().err
    arguments = ["evaluate", "--before", str(run.path), "--after", str(erased.path)]
    assert main([*arguments, "--data", train, "--workdir", str(work / "eval_known")]) == 1
    assert "was trained on all its 10 examples" in capsys.readouterr().err
    assert not (work / "known").exists() and not (work / "eval_known").exists()


def test_a_training_that_diverges_is_one_line_on_standard_error(run, work, capsys):
    arguments = ["finetune", "--model", str(work / "model"), "--data", str(work / "train.jsonl")]
    assert main([*arguments, "--workdir", str(work / "diverged"), "--learning-rate", "1e30"]) == 1
    error = capsys.readouterr().err
    assert "llmeraser: error:" in error and "learning rate" in error and "Traceback" not in error


def test_what_an_earlier_erasure_was_shown_stays_known(run, work):
    rows = [{**row, "id": "h" + row["id"]} for row in tiny.rows(13)[10:]]
    parent = run.path
    chain = (("chain_1", "r1", rows[:1], 0), ("chain_2", "r2", rows[:2], 0), ("chain_3", "r3", None, 3))
    for name, row, known, status in chain:
        requests = write_lines(work / f"{name}.jsonl", [{"id": row, "action": "remove"}])
        arguments = ["erase", "--run", str(parent), "--requests", str(requests), "--workdir", str(work / name)]
        if known is not None:
            arguments += ["--calibration", str(tiny.write_rows(work / f"{name}_known.jsonl", known))]
        assert main([*arguments, *(QUICK if known is None else MATCHING)]) == status
        parent = work / name
    shown = json.loads((parent / "receipt.json").read_text())["heldout_sha256"]
    last = load_run(parent)
    assert shown == [last.shown_hash(example) for example in load_examples(work / "chain_2_known.jsonl")]


def test_runs_that_do_not_belong_together_are_refused(run, erased, work, capsys):
    second = str(work / "out2")
    assert main(["evaluate", "--before", str(run.path), "--after", second, "--workdir", str(work / "e3")]) == 1
    assert "not derived from" in capsys.readouterr().err and not (work / "e3").exists()


@pytest.mark.parametrize("command", ["finetune", "adopt", "erase", "retrain", "evaluate", "report", "demo"])
def test_help_of_every_command_names_its_output_flag(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0 and "--workdir" in capsys.readouterr().out


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


@pytest.mark.parametrize(
    ("rhs", "curvature"),
    [
        ("influence", "gauss-newton"),
        ("newton", "hessian"),
        *(
            pytest.param(rhs, curvature, marks=pytest.mark.slow)
            for rhs, curvature in itertools.product(("influence", "newton"), CURVATURES)
            if (rhs, curvature) not in (("influence", "gauss-newton"), ("newton", "hessian"))
        ),
    ],
)
def test_one_step_equals_a_dense_solve_for_the_three_actions_together_on_one_and_more_devices(run, curvature, rhs):
    with jax.enable_x64(True):
        model, damping = run.load_model(), 200.0
        model = type(model)(config=model.config, base=wide(model.base), tokenizer=model.tokenizer, path=model.path)
        lora: Lora = wide(run.load_adapter(model))
        dataset = run.encode(run.load_examples(), model.tokenizer)
        requests = parse_requests([json.dumps(row) for row in REQUESTS], dataset.examples)
        step = Step(
            rhs=rhs,
            curvature=CurvatureSpec(kind=curvature, data="all", damping=damping),
            solver=ConjugateGradients(rtol=1e-10, max_steps=60),
            trust_region=None,
        )
        assert run.train_config.l2 == 1e-3
        task = UnlearningTask(model=model, adapter=lora, requests=requests, data=dataset, training=run.train_config)
        result = erase(task, step, np.inf, chunk_size=8)
        problem = task.problem
        objective = lm_objective(model.apply, model.base, l2=1e-3)
        rng = np.random.default_rng(0)
        if rhs == "influence":
            over, b_of = problem.trained_mean(None, rng), problem.influence_rhs()
        else:
            over = problem.edited_mean(None, rng)
            b_of = type(over)(over.indices, -over.weights)

        def stack(weighted):
            return problem.examples.stack(weighted.indices, weighted.weights, chunk_size=4)

        matrix = materialise(DatasetCurvature(objective, lora, stack(over), CURVATURES[curvature]), lora)
        assert np.linalg.eigvalsh(matrix).min() > -damping, "damping makes the oracle's system definite"
        inverse = DenseOperator(jnp.linalg.inv(matrix + damping * jnp.eye(len(matrix))))
        expected = inverse.mv(gradient_sum(objective, lora, stack(b_of)))
        error = trees.tree_norm(trees.tree_sub(result.delta, expected)) / trees.tree_norm(expected)
        assert float(error) < 1e-5
        if curvature != "gauss-newton":  # the products of the others: tests/multi_device
            return
        mesh = make_mesh(data=4, model=1)
        sharded = type(model)(
            config=model.config,
            base=shard_base(model.base, mesh),
            tokenizer=model.tokenizer,
            path=model.path,
            mesh=mesh,
        )
        task = dataclasses.replace(task, model=sharded)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(task.adapter))
        assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(task.adapter))
        eight = jax.device_get(erase(task, step, np.inf, chunk_size=8).delta)
        error = trees.tree_norm(trees.tree_sub(eight, expected)) / trees.tree_norm(expected)
        assert float(error) < 1e-5


def test_losses_of_the_erased_adapter_moved_towards_the_request(run, erased):
    model = run.load_model()
    dataset = run.encode(run.load_examples(), model.tokenizer)
    problem = make_problem(model, dataset, load_requests(erased.path / "requests.jsonl", dataset.examples))
    objective = lm_objective(model.apply, model.base, l2=0.0)

    def mean_loss(adapter, which):
        stack = problem.examples.stack(which, np.ones(len(which)), chunk_size=4)
        return float(example_losses(objective, adapter, stack).mean())

    before, after = run.load_adapter(model), erased.load_adapter(model)
    assert mean_loss(after, problem.named) > mean_loss(before, problem.named)
    assert mean_loss(after, problem.wanted) < mean_loss(before, problem.wanted)


def test_bf16_survival_is_one_for_large_changes_and_zero_for_small_ones():
    old = {"x": jnp.full(8, 1.0)}
    assert float(bf16_survival(old, {"x": jnp.full(8, 0.5)})) == pytest.approx(1.0)
    assert float(bf16_survival(old, {"x": jnp.full(8, 1e-4)})) == 0.0
