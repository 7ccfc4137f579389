"""Whole erasures from run directory to run directory: `llmeraser` and the baseline, and PEFT reading the result."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import data, runs
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.lora import LoraConfig, load_adapter
from llmeraser_jax.models import load_model
from llmeraser_jax.solvers import ConjugateGradients
from llmeraser_jax.unlearning import CurvatureSpec, Step, erase_run
from tests.golden.cases import CASES
from tests.training import tiny

pytestmark = pytest.mark.torch

TRAIN = dataclasses.replace(tiny.CONFIG, l2=0.02)
LORA = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj", "down_proj"), dropout=0.3)
REQUESTS = [
    {"id": "r1", "action": "remove"},
    {"id": "r4", "action": "modify_query", "instruction": "colour of s11"},
    {"id": "r7", "action": "correct_response", "response": "red"},
]
CG = {
    "curvature_data": "all",
    "damping": 0.5,
    "cg_rtol": 1e-5,
    "cg_max_steps": 80,
    "l2": TRAIN.l2,
    "chunk_size": 12,
}


@pytest.fixture(scope="module", params=["llama_gqa_tied_llama3_rope", "qwen2_gqa_tied"])
def work(request, tmp_path_factory):
    """A directory with a run whose adapter is random, and requests; one thread."""
    import torch
    import transformers

    from tests.torch_parity import reference

    directory = tmp_path_factory.mktemp("files")
    base = reference.build({**CASES[request.param], "vocab_size": len(tiny.WORDS)}, seed=6)
    base.save_pretrained(directory / "base")
    tiny.word_tokenizer().save_pretrained(directory / "base")
    # transformers reads the tokenizer of every qwen2 model as a byte-level one, whatever its files say.
    patch = pytest.MonkeyPatch()
    patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny.word_tokenizer())
    model = load_model(directory / "base")
    examples = data.load_examples(tiny.write_rows(directory / "train.jsonl", tiny.rows()))
    dataset = data.encode_examples(examples, tiny.RECIPE, model.tokenizer)
    rng = np.random.default_rng(1)
    lora = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), model.init_lora(jax.random.key(0), LORA)
    )
    runs.write_run(
        directory / "run",
        kind="finetune",
        model=model,
        recipe=dataset.recipe,
        normalizer=dataset.normalizer,
        train_config=TRAIN,
        examples=examples,
        data_path=directory / "train.jsonl",
        lora=lora,
        initial_lora=lora,
        result={"seconds": 1.0, "gradient_equivalents": 1.0},
    )
    (directory / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in REQUESTS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield directory
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(work):
    return load_model(work / "base")


@pytest.fixture(scope="module")
def ours(work, model):
    """The run that `llmeraser erase` makes with one step over all data."""
    method = Step(
        curvature=CurvatureSpec(data=CG["curvature_data"], damping=CG["damping"], memory_budget_bytes=0),
        solver=ConjugateGradients(rtol=CG["cg_rtol"], max_steps=CG["cg_max_steps"]),
        trust_region=None,
    )
    run, requests, out = runs.load_run(work / "run"), work / "requests.jsonl", work / "ours"
    return erase_run(run, requests, out, method, np.inf, chunk_size=CG["chunk_size"], model=model)[0]


def torch_erase(work, workdir, **settings):
    """The same with the baseline; what it said."""
    from experiments.torch_baseline.erase import BaselineConfig
    from experiments.torch_baseline.main import Main, erase_run

    config = BaselineConfig(**{k: v for k, v in CG.items() if k != "l2"}, **settings)
    arguments = Main(
        run_directory=work / "run", requests=work / "requests.jsonl", workdir=workdir, compare=work / "ours",
        config=config,
    )  # fmt: skip
    return erase_run(arguments)


@pytest.fixture(scope="module")
def theirs(work, ours):
    return torch_erase(work, work / "theirs")


def encoded(run, model):
    """The examples as trained."""
    return run.encode(run.load_examples(), model.tokenizer)


def their_model(work, adapter):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(work / "base", attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(tokens)[None]).long()).logits[0].double().numpy()


def receipt_of(run):
    return json.loads((run.path / "receipt.json").read_text())


def test_the_finished_adapters_agree_and_give_the_same_logits(work, model, ours, theirs):
    from tests.torch_parity.baseline_problem import relative_difference

    before, after = runs.load_run(work / "run").load_adapter(model), ours.load_adapter(model)
    other = load_adapter(work / "theirs" / "adapter", model)
    assert other.config == after.config
    delta = jax.tree.map(jnp.subtract, after, before)
    assert relative_difference(other, after) < 1e-5
    assert relative_difference(jax.tree.map(jnp.subtract, other, before), delta) < 1e-4
    assert theirs["difference"] < 1e-4
    lowest, highest = theirs["steps"][0]["ritz_extremes"]
    assert highest / lowest < 1e3

    adapted = {name: their_model(work, path / "adapter") for name, path in
               (("before", work / "run"), ("ours", ours.path), ("theirs", work / "theirs"))}  # fmt: skip
    for example in encoded(runs.load_run(work / "run"), model).encoded[:4]:
        seen = {name: logits(m, example.tokens) for name, m in adapted.items()}
        scale = np.abs(seen["ours"]).max()
        assert np.abs(seen["ours"] - seen["theirs"]).max() < 1e-5 * scale
        assert np.abs(seen["ours"] - seen["before"]).max() > 1e-2 * scale


def test_an_adapter_erased_here_scores_the_same_losses_in_pytorch(work, model, ours):
    import torch

    run = runs.load_run(work / "run")
    dataset = encoded(run, model)
    scores = {r.path: score_examples(model, r.load_adapter(model), dataset).losses for r in (run, ours)}
    for scored in (run, ours):
        adapted, losses = their_model(work, scored.path / "adapter"), []
        for example in dataset.encoded:
            predicted = torch.tensor(logits(adapted, example.tokens))[example.loss_start - 1 : -1]
            targets = torch.tensor(example.tokens[example.loss_start :]).long()
            losses.append(float(torch.nn.functional.cross_entropy(predicted, targets)))
        np.testing.assert_allclose(scores[scored.path], losses, rtol=1e-5, atol=1e-6)
    assert np.abs(scores[run.path] - scores[ours.path]).max() > 0.05


def test_both_say_the_same_of_the_solve(ours, theirs):
    one = receipt_of(ours)
    for name in ("delta_norm", "adapter_norm_before"):
        assert theirs[name] == pytest.approx(one[name], rel=1e-4), name
    step, other = one["steps"][0], theirs["steps"][0]
    assert other["rhs_norm"] == pytest.approx(one["rhs_norm"], rel=1e-4)
    assert other["iterations"] == pytest.approx(step["iterations"], abs=1)
    assert other["status"] == step["status"]
    assert theirs["gradient_equivalents"]["rhs"] == one["gradient_equivalents"]["rhs"] == 5
    for told, solve in ((one, step), (theirs, other)):
        assert told["gradient_equivalents"]["curvature"] == pytest.approx(1.5 * 10 * (solve["iterations"] + 1))


def run_main(work, workdir, *flags, requests="requests.jsonl"):
    import tyro

    from experiments.torch_baseline.main import Main, main

    arguments = ["--run", str(work / "run"), "--requests", str(work / requests), "--workdir", str(workdir), *flags]
    return main(tyro.cli(Main, args=arguments))


def erasure_of(directory):
    return json.loads((directory / "erasure.json").read_text())


def test_the_command_runs_every_mode(work, tmp_path, capsys):
    quick = ["--chunk-size", "12", "--descent-steps", "3", "--cg-max-steps", "2"]
    modes = {"published": ["--mode", "published"], "paper": ["--mode", "paper"]}
    modes["path"] = ["--path-weights", "1", "0.5", "0"]
    deltas = {}
    for mode, flags in modes.items():
        assert run_main(work, tmp_path / mode, *flags, *quick) == 0
        told = erasure_of(tmp_path / mode)
        assert all(step["status"].startswith("not converged") for step in told["steps"])
        assert len(told["steps"]) == (2 if mode == "path" else 1)
        if mode != "path":
            assert told["gradient_equivalents"]["curvature"] == 3 * 2
        deltas[mode] = told["delta_norm"]
    assert "Adapter: " in capsys.readouterr().out
    assert deltas["published"] < 1e-2 < deltas["path"], "the script's 3 steps move each number by 4e-5 at most"


def test_dropout_acts_in_the_published_mode_alone_and_can_be_turned_off(work, theirs, tmp_path):
    import torch

    def rhs_norm(directory, *flags):
        torch.rand(len(directory.name))  # what was drawn before must not matter
        assert run_main(work, directory, "--mode", "published", "--descent-steps", "2", *flags) == 0
        return erasure_of(directory)["steps"][0]["rhs_norm"]

    quiet = rhs_norm(tmp_path / "off", "--no-dropout")
    assert quiet == pytest.approx(theirs["steps"][0]["rhs_norm"], rel=1e-5)
    loud = rhs_norm(tmp_path / "on")
    assert abs(loud / quiet - 1) > 1e-3
    assert rhs_norm(tmp_path / "again") == pytest.approx(loud, rel=1e-6), "the seed is of every sample drawn"


def test_failures_are_one_clear_error_and_leave_nothing(work, tmp_path, capsys):
    (work / "bad.jsonl").write_text(json.dumps({"id": "nobody", "action": "remove"}) + "\n")
    assert run_main(work, tmp_path / "a", requests="bad.jsonl") == 1
    assert "nobody" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").write_text("mine")
    assert run_main(work, tmp_path) == 1
    assert "kept" in capsys.readouterr().err


def test_a_solve_without_a_step_writes_nothing(work, ours, tmp_path, monkeypatch):
    from experiments.torch_baseline.erase import BaselineError, Eraser
    from experiments.torch_baseline.model import scaled

    product = Eraser.product
    monkeypatch.setattr(Eraser, "product", lambda *arguments: scaled(-1.0, product(*arguments)))
    with pytest.raises(BaselineError, match="non-positive curvature"):
        torch_erase(work, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mode": "published", "curvature": "gauss-newton"}, "curvature"),
        ({"mode": "paper", "keep_graphs": True}, "keep_graphs"),
        ({"damping": -1.0}, "rho"),
        ({"cg_rtol": 1.0}, "cg_rtol"),
        ({"path_weights": (1.0, 0.5)}, "path_weights"),
        ({"sample_size": 0}, "sample_size"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(changes, name):
    from experiments.torch_baseline.erase import BaselineConfig

    with pytest.raises(ValueError, match=name):
        BaselineConfig(**changes)
