"""Ensembles, and what trains them: SISA, RecEraser and several retrainings."""

import dataclasses
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmeraser_jax import data, trees
from llmeraser_jax.evaluation.scoring import score_examples
from llmeraser_jax.models import generate, layers
from llmeraser_jax.rivals import (
    SISA,
    RecEraser,
    Retrain,
    ensemble_model,
    generate_ensemble,
    make_ensemble,
    shards,
)
from llmeraser_jax.rivals.ensemble import AttentionGate, MeanHiddenState
from llmeraser_jax.rivals.receraser import fit_gate
from llmeraser_jax.runs import RunError
from llmeraser_jax.training import finetune
from llmeraser_jax.unlearning import Workspace
from tests.rivals.gates import drawn_gate

WORKSPACE = Workspace()
SHARDED = SISA(num_shards=3, num_slices=2, seed=1)
GATED = RecEraser(num_shards=3, attention_steps=60)


@pytest.fixture(scope="module")
def short(task):
    """The task with few epochs to train for, so that shards cost little."""
    return dataclasses.replace(task, training=dataclasses.replace(task.training, epochs=2))


@pytest.fixture(scope="module")
def trained_rows():
    """Gradients that trainings of shards took, counted from their arguments."""
    total = {"now": 0}

    def counting(model, dataset, config, **options):
        total["now"] += config.epochs * len(dataset)
        return finetune(model, dataset, config, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "finetune", counting)
        yield total


@pytest.fixture(scope="module")
def sisa(short, trained_rows):
    trained_rows["now"] = 0
    prepared = SHARDED.prepare(short)
    before = trained_rows["now"]
    return prepared, before, SHARDED.run(short, WORKSPACE, prepared), trained_rows["now"] - before


@pytest.fixture(scope="module")
def receraser(short, trained_rows):
    trained_rows["now"] = 0
    prepared = GATED.prepare(short)
    before = trained_rows["now"]
    return prepared, before, GATED.run(short, WORKSPACE, prepared), trained_rows["now"] - before


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def one_batch(task):
    """All ten rows as trained, as one micro-batch."""
    stack = task.dataset.stack_uniform(np.arange(10), np.ones(10), chunk_size=16)
    return jax.tree.map(lambda leaf: leaf[0], stack.batches[0])


@partial(jax.jit, static_argnames="apply")
def _log_probs(apply, base, params, batch):
    return jax.nn.log_softmax(apply(base, params, batch.tokens, batch.attention_mask, batch.positions), axis=-1)


def log_probs(model, params, batch):
    return np.asarray(_log_probs(model.apply, model.base, params, batch))


@pytest.fixture(scope="module")
def members(task):
    lora = task.adapter
    drawn = [trees.tree_random_normal(jax.random.key(k), lora) for k in range(3)]
    return [trees.tree_axpy(0.2, noise, lora) for noise in drawn]


@pytest.fixture(scope="module")
def separate(task, members):
    """Every member's own log-probabilities [members, batch, response, vocab]."""
    batch = one_batch(task)
    return np.stack([log_probs(task.model, member, batch) for member in members])


def test_probabilities_are_averaged_at_every_position(task, members, separate):
    model, batch = ensemble_model(task.model), one_batch(task)
    got = log_probs(model, make_ensemble(members), batch)
    np.testing.assert_allclose(got, np.log(np.exp(separate).mean(0)), rtol=1e-4, atol=1e-5)
    geometric = np.exp(separate.mean(0))
    got = log_probs(model, make_ensemble(members, aggregation="log-probabilities"), batch)
    np.testing.assert_allclose(got, np.log(geometric / geometric.sum(-1, keepdims=True)), rtol=1e-4, atol=1e-5)


def test_a_single_member_and_a_plain_adapter_predict_as_without_an_ensemble(task, members, separate):
    model, batch = ensemble_model(task.model), one_batch(task)
    assert ensemble_model(model) is model
    np.testing.assert_array_equal(log_probs(model, members[1], batch), separate[1])
    gated = make_ensemble(members[1:2], gate=drawn_gate(task.model.config, 1))
    np.testing.assert_allclose(log_probs(model, gated, batch), separate[1], rtol=1e-5, atol=1e-6)


def test_a_gate_weighs_by_the_prompt_and_its_weights_sum_to_one(task, members, separate):
    model, batch, gate = ensemble_model(task.model), one_batch(task), drawn_gate(task.model.config, 3)
    embeddings = gate.embed(model.base, batch.tokens, batch.attention_mask, batch.positions[:, 0])
    weights = np.exp(gate.log_weights(embeddings))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    # By the formula, one example and member at a time.
    e, leaves = (
        np.asarray(embeddings, np.float64),
        {n: np.asarray(getattr(gate, n)) for n in gate.__dataclass_fields__ if n != "embed"},
    )
    scores = [
        [
            leaves["out"]
            @ np.maximum(leaves["query"] @ ((x - leaves["centre"]) / 0.7) + leaves["key"] @ c + leaves["bias"], 0)
            for c in leaves["centroids"]
        ]
        for x in e
    ]
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    assert weights.std(axis=0).max() > 1e-3  # examples differ
    got = log_probs(model, make_ensemble(members, gate=gate), batch)
    mixture = np.einsum("bk,kbrv->brv", weights, np.exp(separate))
    np.testing.assert_allclose(got, np.log(mixture), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="A gated ensemble needs positions"):
        model.apply(model.base, make_ensemble(members, gate=gate), batch.tokens, batch.attention_mask)


def test_a_prompts_embedding_is_the_mean_of_its_last_hidden_states(task):
    model, batch = task.model, one_batch(task)
    embed = MeanHiddenState(model.config)
    last = batch.positions[:, 0]
    whole = np.asarray(embed(model.base, batch.tokens, batch.attention_mask, last))
    # What comes after the prompt does not matter, nor does padding.
    cut = jnp.where(jnp.arange(batch.tokens.shape[1]) <= last[:, None], batch.tokens, 5)
    np.testing.assert_allclose(embed(model.base, cut, batch.attention_mask, last), whole, rtol=1e-4, atol=1e-5)
    # Norm and head make logits of the second token's hidden state, which the means of one and two tokens tell.
    first = jnp.zeros_like(last)
    of_one, of_two = (embed(model.base, batch.tokens, batch.attention_mask, first + k) for k in range(2))
    normed = layers.rms_norm(2 * of_two - of_one, model.base["final_norm"]["scale"], model.config.norm_eps)
    logits = model.apply(model.base, None, batch.tokens, batch.attention_mask, first[:, None] + 1)
    head = (
        model.base["embed_tokens"]["embedding"].T
        if model.config.tied_embeddings
        else model.base["lm_head"]["kernel"]
    )
    np.testing.assert_allclose(normed @ head, logits[:, 0], rtol=1e-4, atol=1e-4)


def test_an_ensemble_of_copies_generates_what_each_of_them_does(task, members):
    prompts = [row.prompt.tolist() for row in task.dataset.encoded]
    expected = generate(task.model, members[0], prompts, 4)
    model = ensemble_model(task.model)
    gated = make_ensemble([members[0]] * 3, gate=drawn_gate(task.model.config, 3))
    assert generate_ensemble(model, gated, prompts, 4) == expected
    assert len({tuple(row) for row in expected}) > 1
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        generate_ensemble(model, gated, [[1], []], 4)


@pytest.mark.parametrize(("aggregation", "gated"), [("probabilities", True), ("log-probabilities", False)])
def test_every_new_token_is_the_best_of_a_fresh_forward_pass_of_all_members(task, aggregation, gated):
    model = ensemble_model(task.model)
    # Members far apart, so that they do not agree on the next token.
    drawn = [trees.tree_random_normal(jax.random.key(k), task.adapter) for k in range(3)]
    members = [trees.tree_axpy(0.6, noise, task.adapter) for noise in drawn]
    gate = drawn_gate(task.model.config, 3) if gated else None
    ensemble = make_ensemble(members, gate=gate, aggregation=aggregation)
    prompts = [row.prompt.tolist() for row in task.dataset.encoded[:4]]
    prompts[1] = prompts[1][:2]

    @jax.jit
    def mixed(tokens, prompt_end, end):
        places = jnp.arange(32)[None]
        weights = model.apply.log_weights(model.base, ensemble, tokens, places < prompt_end, prompt_end[None] - 1)
        return model.apply.mixed_log_probs(
            model.base, ensemble, weights, tokens, places < end, (end - 1)[None, None]
        )

    def expected(prompt):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + 5):
            scores = mixed(jnp.asarray(tokens), jnp.asarray(len(prompt)), jnp.asarray(end))
            tokens[0, end] = int(jnp.argmax(scores))
        return tokens[0, len(prompt) : len(prompt) + 5].tolist()

    found = generate_ensemble(model, ensemble, prompts, 5, batch_size=3, stop_ids=())
    assert found == [expected(prompt) for prompt in prompts]
    alone = [generate(task.model, member, prompts, 5, stop_ids=()) for member in members]
    assert len({str(other) for other in alone}) == 3  # the members do not agree, and a gate chooses among them


def test_a_gate_learns_which_member_knows_what():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 2, 40)
    embeddings = jnp.asarray(np.eye(2)[group] * 2 - 1 + 0.1 * rng.normal(size=(40, 2)), jnp.float32)
    # Member k gives the responses of group k probability 0.9, those of the other one 0.1.
    known = np.where(group == np.arange(2)[:, None], 0.9, 0.1)
    width, hidden = 2, 8
    gate = AttentionGate(
        centre=jnp.zeros(width),
        scale=jnp.float32(1.0),
        centroids=jnp.asarray([[1.0, -1.0], [-1.0, 1.0]]),
        query=jnp.asarray(rng.normal(size=(hidden, width)), jnp.float32),
        key=jnp.asarray(rng.normal(size=(hidden, width)), jnp.float32),
        bias=jnp.zeros(hidden),
        out=jnp.zeros(hidden),
        embed=jnp.zeros,  # never called: the embeddings are given
    )
    np.testing.assert_allclose(np.exp(gate.log_weights(embeddings)), 0.5, rtol=1e-6)
    fitted, losses = fit_gate(
        gate,
        embeddings,
        jnp.asarray(np.log(known), jnp.float32)[..., None],
        num_steps=200,
        learning_rate=0.05,
        l2=0.0,
    )
    assert losses[0] == pytest.approx(-np.log(0.5), rel=1e-4)
    assert losses[-1] < 0.2  # -log 0.9 is 0.105
    assert np.exp(fitted.log_weights(embeddings))[np.arange(40), group].min() > 0.9


def test_one_shard_and_one_slice_are_plain_fine_tuning(task):
    single = SISA(num_shards=1, num_slices=1)
    prepared = single.prepare(task)
    assert same(prepared.members[0], task.adapter)  # the run was trained in the same way on the same rows
    fitted = single.run(task, WORKSPACE, prepared)
    plain = finetune(task.model, task.edited, task.training, lora=task.initial)
    assert same(fitted.params.member(0), plain.lora)
    assert fitted.cost.training == 10 * 9
    assert prepared.gradient_equivalents == 10 * 10


def test_a_request_repeats_the_stages_it_touches_and_no_others(sisa, short):
    prepared, _, fitted, _ = sisa
    partition = prepared.partition
    repeated = fitted.details["repeated_from_slice"]
    trainer = SHARDED.trainer(short)
    after = trainer.fit(short.problem.examples, partition, short.current, before=prepared)
    for shard in range(3):
        rows = np.flatnonzero(partition.shard_of == shard)
        named = [int(partition.slice_of[i]) for i in rows if i in short.problem.named]
        assert repeated[shard] == (min(named) if named else 2)
        for stage in range(2):
            unchanged = same(prepared.stages[shard][stage], after.stages[shard][stage])
            assert unchanged == (stage < repeated[shard])


def test_afterwards_the_ensemble_is_one_trained_from_scratch_on_the_edited_shards(sisa, short, finished_run):
    prepared, _, fitted, _ = sisa
    partition, trainer = prepared.partition, SHARDED.trainer(short)
    scratch = trainer.fit(short.problem.examples, partition, short.current)
    assert scratch.repeated_from == (0, 0, 0)
    assert same(fitted.params.members, make_ensemble(scratch.members).members)
    assert not same(fitted.params.members, fitted.before.members)
    assert scratch.gradient_equivalents > fitted.cost.training
    # One row of each slice of shard 1: the first slice decides.
    rows = [np.flatnonzero((partition.shard_of == 1) & (partition.slice_of == number))[0] for number in (1, 0)]
    lines = [{"id": f"r{i}", "action": "remove"} for i in rows]
    both = dataclasses.replace(short, requests=data.parse_requests(lines, finished_run.load_examples()))
    fitted = SHARDED.run(both, WORKSPACE, prepared)
    assert fitted.details["repeated_from_slice"] == [2, 0, 2]
    scratch = trainer.fit(both.problem.examples, partition, both.current)
    assert same(fitted.params.members, make_ensemble(scratch.members).members)


def test_an_untouched_shard_is_reused_bit_for_bit(short, finished_run):
    requests = data.parse_requests([{"id": "r1", "action": "remove"}], finished_run.load_examples())
    one = dataclasses.replace(short, requests=requests)
    prepared = SHARDED.prepare(one)
    fitted = SHARDED.run(one, WORKSPACE, prepared)
    touched = int(prepared.partition.shard_of[1])
    assert fitted.details["num_shards_repeated"] == 1
    for shard in range(3):
        assert same(fitted.params.member(shard), fitted.before.member(shard)) == (shard != touched)


def test_the_costs_of_shards_are_the_gradients_they_took(sisa, receraser):
    prepared, preparing, fitted, repeating = sisa
    assert prepared.gradient_equivalents == fitted.cost.preparation == preparing
    assert fitted.cost.training == repeating
    # 2 epochs over two slices are round(4 / 3) = 1 a stage: first the rows of the first slices, then all.
    assert preparing == 10 + int((prepared.partition.slice_of == 0).sum())
    prepared, preparing, fitted, repeating = receraser
    assert preparing == 2 * 10
    attention = (3 + 1) * 9 / 3  # three members and the base see the 9 rows that are left
    assert prepared.gradient_equivalents == pytest.approx(preparing + 10 / 3)  # embedding all rows
    assert fitted.cost.training == pytest.approx(repeating + attention)
    assert fitted.details["attention_gradient_equivalents"] == pytest.approx(attention)


def test_receraser_divides_evenly_and_its_attention_helps(receraser):
    prepared, _, fitted, _ = receraser
    assert sorted(fitted.details["shard_sizes"]) == [3, 3, 4]
    first, last = fitted.details["attention_loss_first_and_last"]
    assert last < first
    assert fitted.params.num_members == 3
    untouched = [k for k in range(3) if prepared.repeated_from[k] == 0 and k not in _touched(prepared)]
    for shard in untouched:
        assert same(fitted.params.member(shard), fitted.before.member(shard))


def _touched(prepared):
    return {int(prepared.partition.shard_of[i]) for i in (1, 4, 6)}


def test_receraser_is_deterministic_and_forgets_what_was_corrected(receraser, short):
    _, _, fitted, _ = receraser
    again = GATED.run(short, WORKSPACE, GATED.prepare(short))
    assert same(again.params, fitted.params)
    row, wanted = np.array([4]), np.array([10])
    after, before = (
        lambda rows, params=params: score_examples(fitted.model, params, short.problem.examples, rows).losses
        for params in (fitted.params, fitted.before)
    )
    assert after(wanted) < before(wanted)
    assert after(row) > before(row)


def test_receraser_divides_by_user_where_they_are_known(short):
    users = tuple(f"u{k % 5}" for k in range(10))
    prepared = GATED.prepare(dataclasses.replace(short, users=users))
    for user in set(users):
        assert len({int(s) for s, u in zip(prepared.partition.shard_of, users, strict=True) if u == user}) == 1
    with pytest.raises(ValueError, match="There are 3 users for 10 examples"):
        dataclasses.replace(short, users=("a", "b", "c"))


def test_a_shard_that_loses_all_its_rows_takes_no_part(short, finished_run):
    prepared = SHARDED.prepare(short)
    rows = np.flatnonzero(prepared.partition.shard_of == 0)
    lines = [{"id": f"r{i}", "action": "remove"} for i in rows]
    requests = data.parse_requests(lines, finished_run.load_examples())
    fitted = SHARDED.run(dataclasses.replace(short, requests=requests), WORKSPACE, prepared)
    assert fitted.params.num_members == 2
    assert fitted.cost.training == 0.0
    for k in range(2):
        assert same(fitted.params.member(k), fitted.before.member(k + 1))


def test_retraining_is_fine_tuning_on_the_edited_data_from_the_same_start(short):
    one = Retrain(seeds=(7,)).run(short, WORKSPACE)
    train = dataclasses.replace(short.training, seed=7)
    expected = finetune(short.model, short.edited, train, lora=short.initial)
    assert same(one.params, expected.lora)
    assert one.cost.training == 2 * 9
    two = Retrain(seeds=(7, 8)).run(short, WORKSPACE)
    assert same(two.params.member(0), one.params)
    assert not same(two.params.member(1), one.params)
    assert two.cost.training == 2 * 2 * 9
    with pytest.raises(ValueError, match="and 3 is the seed of the trained adapter itself"):
        Retrain(seeds=(3,)).run(short, WORKSPACE)


def test_a_killed_preparation_goes_on_from_its_checkpoints(short, tmp_path, monkeypatch):
    kept, single = dataclasses.replace(short, workdir=tmp_path), SISA(num_shards=1, num_slices=2)
    first = single.prepare(kept)
    assert sorted(p.name for p in (tmp_path / "sisa" / "before").iterdir()) == [
        "shard_0_stage_0",
        "shard_0_stage_1",
    ]
    monkeypatch.setattr(
        importlib.import_module("llmeraser_jax.training.finetune"), "adam_step", None
    )  # a step taken now would fail
    assert same(first.stages, single.prepare(kept).stages)


def test_without_all_hyper_parameters_or_with_a_loss_on_prompts_it_is_refused(short, finished_run):
    with pytest.raises(RunError, match="did not state batch_size"):
        SHARDED.prepare(dataclasses.replace(short, unstated=("batch_size", "seed")))
    recipe = dataclasses.replace(finished_run.recipe, loss_on="all")
    everything = data.encode_examples(finished_run.load_examples(), recipe, short.model.tokenizer)
    with pytest.raises(ValueError, match="loss_on is 'all'; RecEraser weighs"):
        GATED.prepare(dataclasses.replace(short, data=everything))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SISA(num_shards=0), "num_shards is 0"),
        (lambda: make_ensemble([{"a": jnp.zeros(1)}], aggregation="vote"), "aggregation is 'vote'"),
        (lambda: RecEraser(attention_rows=0), "attention_rows is 0"),
        (lambda: RecEraser(attention_l2=-1.0), "attention_l2 is -1.0"),
        (lambda: make_ensemble([]), "at least one member"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
