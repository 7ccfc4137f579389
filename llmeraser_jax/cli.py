"""The console script `llmeraser`: one sub-command for each thing the library does from files to files.

A sub-command is a dataclass, its fields are the flags, and `run` returns the exit status. Everything here is
wiring and words; the work is in the functions that each command calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import jax
import tyro
from jax.sharding import Mesh

from llmeraser_jax import interrupts
from llmeraser_jax.checks import check_at_least
from llmeraser_jax.data import Recipe
from llmeraser_jax.environment import compile_quickly, keep_compiled_programs, library_versions
from llmeraser_jax.lora import LoraConfig
from llmeraser_jax.models.precision import MatmulPrecision
from llmeraser_jax.notation import read_method, read_solver, read_trust_region, write
from llmeraser_jax.parallel import is_primary, mirrored, parse_mesh, start_processes
from llmeraser_jax.text import bounded, printable
from llmeraser_jax.training import TrainConfig
from llmeraser_jax.types import Solver
from llmeraser_jax.unlearning import Auto, Corrected, Receipt, Step, TargetMatching, TrustRegion, Verdict
from llmeraser_jax.unlearning import Path as InfluencePath
from llmeraser_jax.unlearning.judged import Mover

# Heavier imports (models, evaluation) wait until a command runs, so that --help answers at once.

_log = logging.getLogger("llmeraser_jax")


def _say(text: str = "") -> None:
    """Results go to standard output, once; progress and warnings to standard error."""
    if is_primary():
        sys.stdout.write(printable(text) + "\n")
        sys.stdout.flush()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """What to compute on.

    Attributes:
        mesh: devices, e.g. data=4,fsdp=2,model=2: examples are shared out over data and fsdp, the base over fsdp
            and model; see plan. Empty is one device.
        processes: where the devices are those of several processes, each started with this same command: auto on a
            cluster that tells them apart (Cloud TPU, Slurm, Kubernetes, Open MPI), else ADDRESS:PORT,COUNT,INDEX.
            Each must find the base; what else it lacks, the first one sends. Empty is one process.
        matmul_precision: of products with the base's matrices: float32; tf32 (what GPUs call so; three bfloat16
            passes on a TPU); bfloat16 (operands rounded, sums in float32); or auto: bfloat16 on accelerators where
            the base is stored so, else float32. Default: as the run was made, and auto for a new one.
    """

    mesh: str = ""
    processes: str = ""
    matmul_precision: MatmulPrecision | None = None

    def open(self) -> Mesh | None:
        """Connects the processes and lays out their devices; before anything is computed."""
        start_processes(self.processes)
        if not is_primary():
            _log.setLevel(logging.WARNING)
        return parse_mesh(self.mesh)

    def load_run(self, path: Path, model: str | None = None):
        """The run at `path`, to be computed with as these flags say; `model` is where its base is now."""
        from llmeraser_jax.runs import load_run

        run = load_run(path).with_model_at(model)
        return dataclasses.replace(run, matmul_precision=self.matmul_precision or run.matmul_precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """Show what would be trained: each example as the model sees it, with the part under the loss in ⟦ ⟧.

    Needs the tokenizer's files only. Compare it with what your trainer shows before you adopt or fine-tune.

    Attributes:
        model: where the tokenizer is: a base model, an adapter that has one beside it, or a hub id.
        data: training examples, as for finetune.
        recipe: TOML file with any of the keys of adopt's recipe; what it leaves out is as for finetune.
        rows: how many examples to show, from the first; default: 10, and all with --json.
        json: one line per example: id, tokens, loss_mask.
    """

    model: str
    data: Path
    recipe: Path | None = None
    rows: int | None = None
    json: bool = False

    def run(self) -> int:
        from llmeraser_jax.data import encode_examples, load_examples, marked_text
        from llmeraser_jax.data.preview import picture_words, to_json
        from llmeraser_jax.models import load_tokenizer
        from llmeraser_jax.training.adopt import load_recipe

        check_at_least(self, rows=1)
        recipe = Recipe() if self.recipe is None else load_recipe(self.recipe)
        tokenizer = load_tokenizer(self.model)
        dataset = encode_examples(load_examples(self.data), recipe, tokenizer)
        shown = dataset.encoded[: (None if self.json else 10) if self.rows is None else self.rows]
        if self.json:
            for encoded in shown:
                _say(to_json(encoded))
            return 0
        recipe, under_loss = dataset.recipe, int(dataset.num_targets.sum())
        _say(
            f"{len(dataset)} examples, template {recipe.template!r}, loss on {recipe.loss_on!r}: {under_loss} "
            f"tokens under the loss, {under_loss / len(dataset):.1f} an example. "
            f"{dataset.num_truncated} cut, {len(dataset.dropped_ids)} dropped."
        )
        if recipe.date is not None:
            _say(f"The chat template writes a date: {recipe.date}.")
        for encoded in shown:
            pictures = picture_words(encoded, tokenizer)
            _say(
                f"\n--- {encoded.id}: {len(encoded.tokens)} tokens, {encoded.num_targets} under the loss{pictures}"
            )
            _say(marked_text(encoded, tokenizer))
        if len(shown) < len(dataset):
            _say(f"\n... and {len(dataset) - len(shown)} more (--rows).")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """Fine-tune a LoRA adapter and record all that erasing from it needs.

    Killed at any moment and started again with the same flags, it goes on where it was and ends with the same
    adapter.

    Attributes:
        model: base model: a directory in Hugging Face layout, or a hub id.
        data: training examples: JSON, JSON lines, CSV, parquet or a datasets directory; columns
            instruction/input/output, question/answer, prompt/response or prompt/completion, text, messages or
            conversations; optional id.
        workdir: the run directory to make, or to go on in.
        dtype: storage of the frozen base: float32, bfloat16 or float16.
        base_quantization: store the kernels of the base's layers in 4 or 8 bits, as bitsandbytes does: nf4,
            nf4-double (the scales are quantised too) or int8. Later commands on the run do the same. Default: as
            they are in the checkpoint.
        devices: what to compute on.
        tensorboard: also write TensorBoard events (extra tensorboard).
        keep_checkpoints: keep those of the first epoch (--checkpoint-every-steps), so that a retraining can go on
            from before a forgotten row was first seen.
        recipe: how examples become tokens and a loss.
        lora: the adapter.
        train: optimisation.
    """

    model: str
    data: Path
    workdir: Path
    dtype: str = "float32"
    base_quantization: Literal["nf4", "nf4-double", "int8"] | None = None
    devices: tyro.conf.OmitArgPrefixes[Devices] = dataclasses.field(default_factory=Devices)
    tensorboard: bool = False
    keep_checkpoints: bool = False
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)
    lora: tyro.conf.OmitArgPrefixes[LoraConfig] = dataclasses.field(default_factory=LoraConfig)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=TrainConfig)

    def run(self) -> int:
        from llmeraser_jax.models import load_model
        from llmeraser_jax.training.job import finetune_run

        model = load_model(
            self.model,
            dtype=self.dtype,
            mesh=self.devices.open(),
            quantization=self.base_quantization,
            matmul_precision=self.devices.matmul_precision or "auto",
        )
        run = finetune_run(
            model,
            self.data,
            self.workdir,
            recipe=self.recipe,
            lora=self.lora,
            config=self.train,
            tensorboard=self.tensorboard,
            keep_checkpoints=self.keep_checkpoints,
        )
        result = run.result
        _say(f"Fine-tuned on {len(run.data_ids)} examples in {result['seconds']:.1f} s.")
        _say(f"  final loss          {result['loss']:.4f}")
        _say(f"  gradient norm       {result['gradient_norm']:.3g} (of the objective, L2 term included)")
        if result["num_truncated"]:
            _say(f"  examples cut short  {result['num_truncated']}")
        if result.get("num_dropped"):
            _say(f"  examples dropped    {result['num_dropped']} (no token under the loss was left)")
        _say(f"Run directory: {self.workdir}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adopt:
    """Make a run directory of an adapter that was trained elsewhere, so that one can erase from it.

    Attributes:
        model: the base model it was trained on: a directory or a hub id.
        adapter: the adapter, in PEFT's format.
        data: the examples it was trained on.
        recipe: TOML file that states how: template, add_bos, add_eos, loss_on, reduction, truncation_side,
            epochs, l2, dropout; and batch_size, learning_rate, seed if it is to be retrained for comparison.
            `llmeraser recipe` begins one from what the trainer left.
        workdir: the run directory to make.
        dtype: storage of the frozen base: float32, bfloat16 or float16.
        base_quantization: store the kernels of the base's layers in 4 or 8 bits, as bitsandbytes does: nf4,
            nf4-double (the scales are quantised too) or int8. Later commands on the run do the same. Default: as
            they are in the checkpoint.
        devices: what to compute on.
        force: adopt it although another recipe fits the data much better, its loss is not clearly below the base's,
            or is far above the one that the trainer reported.
        show_examples: log a row as the recipe renders it; without it no log holds a text of the data.
    """

    model: str
    adapter: Path
    data: Path
    recipe: Path
    workdir: Path
    dtype: str = "float32"
    base_quantization: Literal["nf4", "nf4-double", "int8"] | None = None
    devices: tyro.conf.OmitArgPrefixes[Devices] = dataclasses.field(default_factory=Devices)
    force: bool = False
    show_examples: bool = False

    def run(self) -> int:
        from llmeraser_jax.models import load_model
        from llmeraser_jax.training.adopt import adopt

        model = load_model(
            self.model,
            dtype=self.dtype,
            mesh=self.devices.open(),
            quantization=self.base_quantization,
            matmul_precision=self.devices.matmul_precision or "auto",
        )
        run = adopt(
            model,
            self.adapter,
            self.data,
            self.recipe,
            self.workdir,
            force=self.force,
            show_examples=self.show_examples,
        )
        result = run.result
        _say(f"Adopted an adapter trained on {len(run.data_ids)} examples.")
        _say(f"  loss with / without the adapter     {result['loss']:.4f} / {result['base_loss']:.4f}")
        if result["trainer_loss"] is not None:
            where = result["trainer_loss_from"]
            _say(f"  the trainer's last loss             {result['trainer_loss']:.4f} ({where})")
        fit = result["recipe_fit"]
        _say(
            f"  responses of a sample, as stated    {fit['stated']:.4f}; the best of {fit['num_tried']} recipes is "
            f"{fit['best_is']}, {fit['best']:.4f}"
        )
        _say(
            f"  gradient norm, objective / data     {result['gradient_norm']:.3g} / "
            f"{result['data_gradient_norm']:.3g} (on {result['num_sampled']} sampled examples)"
        )
        for note in result["notes"]:
            _say(f"  note: {note}")
        _say(f"Run directory: {self.workdir}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what fits: memory of each device for finetune, erase, retrain and evaluate, mesh and micro-batch.

    By arithmetic from shapes, which was checked against the TPU compiler; --compile asks the compiler here. A
    model's config.json suffices, and the tokenizer's files where the data is to be measured. The exit status is 3
    where something does not fit.

    Attributes:
        model: directory with config.json, or a hub id.
        data: training examples, as for finetune; default: --time and --response say how long rows are.
        time: tokens of the longest rows; default: the data's.
        response: their tokens under the loss; default: the data's.
        named: rows that requests name; default: 1 % of the data, and 100 without data.
        device: what to plan for; default: the devices here.
        mesh: as for the other commands; default: the smallest of 1, 2, 4, ... devices that fits.
        dtype: storage of the frozen base: float32, bfloat16 or float16.
        base_quantization: see finetune.
        compile: also compile a gradient and a Gauss-Newton product with the planned mesh and micro-batch, for the
            devices here, and print their peaks beside the arithmetic; minutes at 7 billion parameters.
        recipe: how examples become tokens.
        lora: the adapter.
    """

    model: str
    data: Path | None = None
    time: int | None = None
    response: int | None = None
    named: int | None = None
    device: Literal["v5e", "v5p", "v6e", "h100", "h200", "a100"] | None = None
    mesh: str = ""
    dtype: str = "bfloat16"
    base_quantization: Literal["nf4", "nf4-double", "int8"] | None = None
    compile: bool = False
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = dataclasses.field(default_factory=Recipe)
    lora: tyro.conf.OmitArgPrefixes[LoraConfig] = dataclasses.field(default_factory=LoraConfig)

    def run(self) -> int:
        from llmeraser_jax import planning
        from llmeraser_jax.curvature.row_sets import ROW_MEMORY_BYTES
        from llmeraser_jax.models import model_config
        from llmeraser_jax.parallel import mesh_sizes

        check_at_least(self, time=1, response=1, named=1)
        time, response, rows = self._rows()
        memory = planning.device_bytes() if self.device is None else planning.DEVICE_BYTES[self.device]
        if memory is None:
            known = ", ".join(planning.DEVICE_BYTES)
            msg = f"The devices here do not say how much memory they have; give --device, one of {known}."
            raise ValueError(msg)
        named = self.named or (100 if rows is None else max(rows // 100, 1))
        config = model_config(self.model)

        def plan(mesh):
            work = planning.Workload(
                config=config, lora=self.lora, mesh=mesh, time=time, response=response, dtype=self.dtype,
                quantization=self.base_quantization,
            )  # fmt: skip
            return work, planning.needs(work, memory, named, ROW_MEMORY_BYTES)

        work, needs = plan(mesh_sizes(self.mesh)) if self.mesh else planning.smallest(plan)
        _say(
            f"{work.num_parameters / 1e9:.3g} billion parameters in {self.base_quantization or self.dtype}, "
            f"an adapter of {work.adapter_bytes / 4e6:.3g} million."
        )
        count = "" if rows is None else f"{rows} rows of "
        _say(f"{count}at most {time} tokens, {response} of them under the loss; {named} rows named.")
        gib = planning.GIB
        _say(
            f"--mesh {planning.words_of(work.mesh)}: {work.devices} devices of {memory / gib:.4g} GiB. "
            "GiB of each, by arithmetic that was checked against the TPU compiler (experiments/pod):"
        )
        _say(f"  {'':<10}{'base':>8}{'fixed':>8}{'peak':>8}  {'rows':<6}")
        for need in needs:
            sizes = "".join(f"{size / gib:>8.2f}" for size in (work.base_bytes, need.fixed, need.peak))
            note = need.note if need.rows else "DOES NOT FIT"
            _say(f"  {need.command:<10}{sizes}  {need.rows or '-':<6}{note}".rstrip())
        _say("fixed: whatever the micro-batch is. rows: of each device in a micro-batch.")
        fits = all(need.rows for need in needs)
        if self.compile:
            from llmeraser_jax.compiled import compiled_peaks

            for peak in compiled_peaks(work, needs):
                fits = fits and peak.compiled <= memory
                _say(
                    f"{peak.program} of {peak.rows} rows: {peak.compiled / gib:.2f} GiB as compiled for "
                    f"{jax.devices()[0].device_kind}, {peak.arithmetic / gib:.2f} by arithmetic."
                )
        return 0 if fits else 3

    def _rows(self) -> tuple[int, int, int | None]:
        """Tokens of the longest rows, those under the loss, and how many rows there are."""
        if self.data is None:
            if self.time is None or self.response is None:
                msg = "Nothing says how long the rows are; give --data, or --time and --response."
                raise ValueError(msg)
            return self.time, self.response, None
        from llmeraser_jax.data import encode_examples, load_examples
        from llmeraser_jax.models import load_tokenizer

        examples = load_examples(self.data)
        if self.time is not None and self.response is not None:
            return self.time, self.response, len(examples)
        tokenizer = load_tokenizer(self.model)
        if tokenizer is None:
            msg = f"{self.model} has no tokenizer to measure the data with; give --time and --response."
            raise ValueError(msg)
        shape = encode_examples(examples, self.recipe, tokenizer).uniform_shape
        return self.time or shape.time, self.response or shape.response, len(examples)


OwnMethod = (
    Annotated[Auto, tyro.conf.subcommand("auto")]
    | Annotated[TargetMatching, tyro.conf.subcommand("target-matching")]
    | Annotated[InfluencePath, tyro.conf.subcommand("path")]
    | Annotated[Step, tyro.conf.subcommand("step")]
    | Annotated[Corrected, tyro.conf.subcommand("corrected")]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOf:
    """Begin adopt's recipe from what a trainer left: PEFT, TRL, transformers' Trainer, axolotl, LLaMA-Factory.

    What is found stands in the recipe with its source; what is missing stands there as a question.

    Attributes:
        source: the directory of an adapter, or one file: adapter_config.json, trainer_state.json,
            training_args.json (TRL's arguments as JSON), a model card, or the YAML of axolotl or LLaMA-Factory.
        output: the recipe to write; default: standard output.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="from")]
    output: Path | None = None

    def run(self) -> int:
        from llmeraser_jax.files import atomic_write_text
        from llmeraser_jax.training.trainers import find_recipe

        if self.output is not None and self.output.exists():
            msg = f"{self.output} is there already; name another file."
            raise FileExistsError(msg)
        found = find_recipe(self.source)
        if self.output is None:
            _say(found.to_toml().rstrip("\n"))
            return 0
        atomic_write_text(self.output, found.to_toml())
        for line in (*found.facts, *found.notes):
            _say(line)
        for key, stated in found.values.items():
            _say(f"  {key:<18}{stated.value!r:<14} {stated.source}")
        for key, question in found.questions.items():
            _say(f"  {key:<18}{'?':<14} {question}")
        _say(f"Recipe: {self.output}   ({len(found.questions)} questions to answer in it)")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Erase:
    """Carry out a request file: remove examples, modify their queries, correct their responses.

    Requests are JSON lines:
      {"id": "17", "action": "remove"}
      {"id": "18", "action": "modify_query", "query": "..."}
      {"id": "19", "action": "correct_response", "response": "..."}

    The method comes last, with its own flags: llmeraser erase ... path --num-steps 12. Flags of one method:
    llmeraser erase path --help.

    Attributes:
        run_directory: the run to erase from (finetune, adopt, or an earlier erase).
        requests: the request file.
        workdir: directory to make: the new adapter and the one before (PEFT; `llmeraser seal` removes the latter),
            receipt.json, and the edited data, so that it can be erased from again.
        calibration: examples of the same kind that were not trained on; they show where removed rows should end.
            Without them removals go along the influence path, which costs more and can go too far.
        target_loss: where removed rows should end, nats per token, instead of the calibration rows' mean loss.
        budget: at most this share of a retraining's gradient equivalents; inf lifts the limit. Default: 1.
        model: where the base model is now; default: where it was.
        data: where the training data is now; default: where it was.
        on_incomplete: what to do where the validity check does not call the outcome complete. warn writes the
            adapter; the exit status is 3 if forget rows have not arrived or other rows were harmed, and 4 if
            nothing shows where removed rows should end. refuse writes nothing. retrain writes the adapter of a
            retraining, also where the drift of the chain says "retrain now"; it goes on from the last checkpoint
            before the first forgotten row was seen where finetune kept any (--keep-checkpoints).
        seed: of every sample drawn.
        chunk_size: examples per micro-batch; memory grows with it, results do not change. auto is 16 on a CPU, and
            on accelerators what fits, see plan.
        audit: report gradient norms of all examples instead of a sample.
        devices: what to compute on.
        method: how to forget.
    """

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    requests: Path
    workdir: Path
    calibration: Annotated[Path | None, tyro.conf.arg(aliases=("--heldout",))] = None
    target_loss: float | None = None
    budget: float | None = None
    model: str | None = None
    data: Path | None = None
    on_incomplete: Annotated[Literal["warn", "refuse", "retrain"], tyro.conf.arg(aliases=("--fallback",))] = "warn"
    seed: int = 0
    chunk_size: int | Literal["auto"] = "auto"
    audit: bool = False
    devices: tyro.conf.OmitArgPrefixes[Devices] = dataclasses.field(default_factory=Devices)
    method: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[OwnMethod]] = dataclasses.field(
        default_factory=Auto
    )

    def run(self) -> int:
        from llmeraser_jax.unlearning import IncompleteError

        mesh = self.devices.open()
        run = self.devices.load_run(self.run_directory, self.model)
        try:
            receipt = self._erase(run, mesh)
        except IncompleteError as error:
            _tell_rows(error.receipt)
            sys.stderr.write(f"llmeraser: error: {error}\n")
            return _status(error.receipt)
        return _status(receipt)

    def _erase(self, run, mesh: Mesh | None) -> Receipt:
        """Erases, and says the receipt in a few lines on standard output."""
        from llmeraser_jax.unlearning.drift import words_of
        from llmeraser_jax.unlearning.job import erase_run
        from llmeraser_jax.unlearning.receipt import RECEIPT_FILE, read_receipt

        made, result = erase_run(
            run,
            self.requests,
            self.workdir,
            self.method,
            self.budget,
            seed=self.seed,
            chunk_size=self.chunk_size,
            audit=self.audit,
            mesh=mesh,
            data_path=self.data,
            calibration_path=self.calibration,
            target_loss=self.target_loss,
            on_incomplete=self.on_incomplete,
        )
        receipt = result.receipt
        assert receipt is not None  # of the package's own methods
        counts = ", ".join(f"{count} {action}" for action, count in receipt.counts.items() if count)
        _say(f"Requests: {counts}, of {receipt.num_examples_before} examples.")
        _tell_rows(receipt)
        _say(f"  change          norm {receipt.delta_norm:.3g}, adapter {receipt.adapter_norm_before:.3g}")
        _say(f"  since training  {words_of(read_receipt(made) or {})}")
        adapter, path = self.workdir / "adapter", self.workdir / RECEIPT_FILE
        _say(f"Adapter: {adapter}   receipt, with the solver's details: {path}")
        return receipt


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueAdd:
    """Add a deletion request; it is checked against the data, and nothing is erased yet.

    Attributes:
        ledger: directory of the ledger; made by the first request.
        run_directory: the run that the request is about; default: where the ledger's last processing ended.
        subject: whom the rows are about; the ledger keeps an HMAC of it.
        pseudonym: instead, an id of your own, which is kept as it stands.
        ids: rows to remove.
        where: instead, COLUMN=VALUE: remove the rows that have this value in a column of the training data.
        requests: instead, a request file as for erase, for edits.
        requester: who asked: a role such as "data subject"; kept as it stands.
        reason: kept as it stands; name no person in it.
        received: the day it came, YYYY-MM-DD; default: today.
        due: the day it must be answered by; default: a month after it came.
        data: where the training data is now, and the column of --where; default: where it was.
    """

    ledger: Path
    run_directory: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    subject: str | None = None
    pseudonym: str | None = None
    ids: tuple[str, ...] = ()
    where: str | None = None
    requests: Path | None = None
    requester: str = ""
    reason: str = ""
    received: datetime.date | None = None
    due: datetime.date | None = None
    data: Path | None = None

    def run(self) -> int:
        from llmeraser_jax.deletion import Ledger, add_entry
        from llmeraser_jax.deletion.pending import current_run
        from llmeraser_jax.runs import load_run

        if self.run_directory is None:
            current_run(Ledger(self.ledger))  # without either, no ledger is made
        else:
            load_run(self.run_directory)
        entry = add_entry(
            Ledger.open(self.ledger),
            self.run_directory,
            subject=self.subject,
            pseudonym=self.pseudonym,
            ids=self.ids,
            where=self.where,
            requests_path=self.requests,
            requester=self.requester,
            reason=self.reason,
            received=self.received,
            due=self.due,
            data_path=self.data,
        )
        _say(f"Entry {entry.number}: {_count(len(entry.rows), 'row')}, subject {entry.subject}, due {entry.due}.")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueList:
    """Show every request and what has become of it.

    Attributes:
        ledger: directory of the ledger.
    """

    ledger: Path

    def run(self) -> int:
        from llmeraser_jax.deletion import Ledger, read_state

        entries = read_state(Ledger(self.ledger).lines()).entries
        _tell_entries(list(entries.values()))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueDue:
    """Show the requests that are due, the earliest first.

    The exit status is 0 where nothing is due, else 3.

    Attributes:
        ledger: directory of the ledger.
        by: the day until which; default: today.
    """

    ledger: Path
    by: datetime.date | None = None

    def run(self) -> int:
        from llmeraser_jax.deletion import Ledger, read_state

        ledger = Ledger(self.ledger)
        by = ledger.now().date() if self.by is None else self.by
        state = read_state(ledger.lines())
        due = state.waiting(by)
        waiting = state.waiting()
        if state.batch is not None:
            _say(f"Batch {state.batch.number} is unfinished: `llmeraser queue process` goes on with it.")
        if not due:
            rest = (
                f" {_count(len(waiting), 'entry', 'entries')} wait, the next until {waiting[0].due}."
                if waiting
                else ""
            )
            _say(f"Nothing is due by {by}.{rest}")
            return 0
        _tell_entries(due)
        return 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueProcess:
    """Erase what is due, in one request file, and write the outcomes back.

    Killed at any moment, the same command goes on and does nothing twice. The exit status is that of erase.

    Attributes:
        ledger: directory of the ledger.
        run_directory: the run to erase from; default: where the last processing ended.
        all: also what is due later.
        by: what is due until this day; default: today.
        workdir: directory to make, as by erase; default: runs/batch-NUMBER in the ledger.
        calibration: see erase; so are the flags that follow, and the method at the end.
        target_loss: where removed rows should end, nats per token.
        budget: at most this share of a retraining's gradient equivalents.
        data: where the training data is now; default: where it was.
        on_incomplete: what to do where the outcome is not called complete: warn, refuse or retrain.
        seed: of every sample drawn.
        chunk_size: examples per micro-batch.
        devices: what to compute on.
        method: how to forget.
    """

    ledger: Path
    run_directory: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    all: bool = False
    by: datetime.date | None = None
    workdir: Path | None = None
    calibration: Path | None = None
    target_loss: float | None = None
    budget: float | None = None
    data: Path | None = None
    on_incomplete: Literal["warn", "refuse", "retrain"] = "warn"
    seed: int = 0
    chunk_size: int = 16
    devices: tyro.conf.OmitArgPrefixes[Devices] = dataclasses.field(default_factory=Devices)
    method: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[OwnMethod]] = dataclasses.field(
        default_factory=Auto
    )

    def run(self) -> int:
        from llmeraser_jax.unlearning import IncompleteError
        from llmeraser_jax.unlearning.drift import words_of

        mesh = self.devices.open()
        try:
            processed = self._process(mesh)
        except IncompleteError as error:
            _tell_rows(error.receipt)
            sys.stderr.write(f"llmeraser: error: {error} The entries wait as before.\n")
            return _status(error.receipt)
        if processed is None:
            if not self.all:
                return QueueDue(ledger=self.ledger, by=self.by).run()
            _say("No entry waits.")
            return 0
        if processed.fresh is not None:
            _tell_rows(processed.fresh)
        _say(f"  since training  {words_of(processed.receipt)}\n")
        _tell_entries(processed.entries)
        _say(f"Run: {processed.run.path}   `llmeraser certify {processed.run.path}` writes its certificate.")
        receipt = processed.receipt
        check = receipt["validity"]
        return 0 if receipt["complete"] else 4 if check and check["verdict"] == Verdict.NOT_JUDGED else 3

    def _process(self, mesh: Mesh | None):
        """With a progress bar."""
        from llmeraser_jax.deletion import Ledger, process_queue
        from llmeraser_jax.tracking import progress

        with progress(description="erasing the forget rows", total=100) as bar:

            def on_step(step) -> None:
                bar.update(round(100 * step.progress) - bar.n)

            return process_queue(
                Ledger(self.ledger),
                self.run_directory,
                by=self.by,
                everything=self.all,
                workdir=self.workdir,
                method=self.method,
                budget=self.budget,
                compute={"mesh": mesh, "data_path": self.data, "on_step": on_step},
                calibration_path=None if self.calibration is None else self.calibration.resolve(),
                target_loss=self.target_loss,
                on_incomplete=self.on_incomplete,
                seed=self.seed,
                chunk_size=self.chunk_size,
            )


QueueCommand = (
    Annotated[QueueAdd, tyro.conf.subcommand("add")]
    | Annotated[QueueList, tyro.conf.subcommand("list")]
    | Annotated[QueueDue, tyro.conf.subcommand("due")]
    | Annotated[QueueProcess, tyro.conf.subcommand("process")]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queue:
    """Keep deletion requests in a ledger, and process them when they are due.

    Attributes:
        command: what to do with the ledger.
    """

    command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[QueueCommand]]

    def run(self) -> int:
        return self.command.run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certify:
    """Measure an erasure and write its certificate: HTML and Markdown for people, JSON for machines, a signature.

    Certify before the run is sealed and the run before it is deleted: afterwards the texts of the erased rows are
    gone, and the certificate has what the receipt recorded.

    Attributes:
        run_directory: made by erase or queue process; gets certificate/.
        ledger: where the requests came from; default: the ledger that the run lies in.
        key: Ed25519 private key to sign with, made by `openssl genpkey -algorithm ed25519 -out KEY.pem` or
            ssh-keygen; needs the extra "certificate". Default: not signed.
        calibration: rows that no model was trained on, for membership inference; default: what queue process was
            given.
        data: where the training data of the run before is now; default: where it was.
        devices: what to compute on.
    """

    run_directory: tyro.conf.Positional[Path]
    ledger: Path | None = None
    key: Path | None = None
    calibration: Path | None = None
    data: Path | None = None
    devices: tyro.conf.OmitArgPrefixes[Devices] = dataclasses.field(default_factory=Devices)

    def run(self) -> int:
        from llmeraser_jax.deletion import Ledger, certify

        mesh = self.devices.open()
        page = certify(
            self.devices.load_run(self.run_directory),
            ledger=None if self.ledger is None else Ledger(self.ledger),
            key_path=self.key,
            calibration_path=self.calibration,
            data_path=self.data,
            mesh=mesh,
        )
        _say(f"Certificate: {page}   (.md, .json{'' if self.key is None else ', .json.sig'})")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrain:
    """Train again on the edited data, once per seed: the oracle that erasing is compared with.

    Attributes:
        run_directory: the run that the requests are about.
        requests: the request file.
        workdir: gets one run directory per seed; started again, it goes on where it was.
        seeds: how many retrainings; their seeds differ from the run's own.
        replay: instead, once, with the run's own seed from the last checkpoint that finetune kept before the first
            forgotten row was seen.
        model: where the base model is now; default: where it was.
        data: where the training data is now; default: where it was.
        devices: what to compute on.
    """

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    requests: Path
    workdir: Path
    seeds: int = 3
    replay: bool = False
    model: str | None = None
    data: Path | None = None
    devices: tyro.conf.OmitArgPrefixes[Devices] = dataclasses.field(default_factory=Devices)

    def run(self) -> int:
        from llmeraser_jax.data import load_requests
        from llmeraser_jax.training.replay import replay
        from llmeraser_jax.training.retrain import retrain

        mesh = self.devices.open()
        run = self.devices.load_run(self.run_directory, self.model)
        requests = load_requests(mirrored(self.requests), run.load_examples(self.data))
        model = run.load_model(mesh=mesh)
        if self.replay:
            runs = (replay(run, requests, self.workdir / "replay", model=model, data_path=self.data),)
        else:
            runs = retrain(run, requests, self.workdir, seeds=self.seeds, model=model, data_path=self.data)
        for retrained in runs:
            result = retrained.result
            _say(
                f"{retrained.path}: loss {result['loss']:.4f} after {result['seconds']:.1f} s "
                f"({result['gradient_equivalents']:.0f} gradient equivalents)"
            )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare before, unlearned and retrained, with controls, and write a report.

    Attributes:
        before: the run that was erased from.
        after: the directory that `llmeraser erase` made.
        workdir: gets report.html (needs no other file), report.md, report.json and plots.
        retrained: the directory that `llmeraser retrain` made; without it, what needs no oracle is reported.
        data: held-out examples, which no model was trained on; those that `erase` was shown (--heldout) are left
            out of membership inference.
        train_data: where the training data of --before is now; default: where it was.
        model: where the base model is now; default: where it was.
        show_texts: keep the forget set's texts, and what each model answers to its questions, in the report.
            Without it no text of an example is kept: what was to be forgotten must not live on in a report.
        devices: what to compute on.
    """

    before: Path
    after: Path
    workdir: Path
    retrained: Path | None = None
    data: Path | None = None
    train_data: Path | None = None
    model: str | None = None
    show_texts: Annotated[bool, tyro.conf.arg(aliases=("--show-examples",))] = False
    devices: tyro.conf.OmitArgPrefixes[Devices] = dataclasses.field(default_factory=Devices)

    def run(self) -> int:
        from llmeraser_jax.evaluation.job import evaluate_runs, retrained_runs
        from llmeraser_jax.evaluation.page import terminal_blocks
        from llmeraser_jax.evaluation.render import HTML_FILE, MARKDOWN_FILE, render_text

        mesh = self.devices.open()
        report = evaluate_runs(
            self.devices.load_run(self.before, self.model),
            self.devices.load_run(self.after, self.model),
            self.workdir,
            retrained=() if self.retrained is None else retrained_runs(self.retrained),
            heldout_path=self.data,
            data_path=self.train_data,
            show_texts=self.show_texts,
            mesh=mesh,
        )
        _say(render_text(terminal_blocks(report)))
        _say(f"Report: {self.workdir / HTML_FILE}   ({MARKDOWN_FILE})")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Gather any number of results into one page that explains itself.

    Evaluations of one request on one run are put side by side: models and measures, cost against fidelity, each
    example of the forget set before and after. Comparisons of experiments have a section each. Erasures add what
    their solvers certify, trainings what they cost.

    Attributes:
        directories: made by evaluate, erase, retrain, finetune, adopt or an experiment, or holding such
        directories.
        workdir: gets report.html (needs no other file), report.md and PNG files.
    """

    directories: tyro.conf.Positional[tuple[Path, ...]]
    workdir: Path

    def run(self) -> int:
        from llmeraser_jax.evaluation.job import write_overview

        page = write_overview(self.directories, self.workdir)
        _say(f"Report: {page}   ({page.with_suffix('.md')})")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Fine-tune a small model on fictitious people, make it forget some, and compare with retraining.

    Needs no files and no network; takes a few minutes on two cores. The exit status is 0 when at least half of
    the gap to retraining is closed for removal, query modification and response correction alike.

    Attributes:
        workdir: where everything is kept; default: llmeraser-demo here, or the next free name.
    """

    workdir: Path | None = None

    def run(self) -> int:
        from llmeraser_jax.demo.run import run_demo

        return run_demo(self.workdir, say=_say)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write base and adapter of a run as one model, for servers that load no adapters.

    The losses of the examples are measured on the weights as they are read back, since rounding can take back what
    erasing changed.

    Attributes:
        run_directory: the run (finetune, adopt, erase or retrain).
        merged: directory to make: Hugging Face's layout, with tokenizer and generation configuration.
        dtype: of the weights: bfloat16, float32 or float16.
        quantization: store the layers' kernels as bitsandbytes does: nf4, nf4-double or int8.
        data: where the training data is now, of an erasure that of the run before it; default: where it was.
        model: where the base model is now; default: where it was.
    """

    run_directory: tyro.conf.Positional[Path]
    merged: Path
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    quantization: Literal["nf4", "nf4-double", "int8"] | None = None
    data: Path | None = None
    model: str | None = None

    def run(self) -> int:
        from llmeraser_jax.export import EXPORT_FILE, export_run
        from llmeraser_jax.runs import load_run

        exported = export_run(
            load_run(self.run_directory).with_model_at(self.model),
            self.merged,
            dtype=self.dtype,
            quantization=self.quantization,
            data_path=self.data,
        )
        stored = self.dtype if self.quantization is None else f"{self.quantization}, the rest {self.dtype}"
        _say(f"Merged model: {self.merged}   ({exported.num_bytes / 1e6:.1f} MB in {exported.num_files}, {stored})")
        _say(f"  {'mean loss, nats per token':<28}{'before':>9}{'adapter':>9}{'exported':>9}   as read back")
        for name in ("forget", "replacements", "retained"):
            group = getattr(exported, name)
            if group is not None:
                before = "" if group.before is None else f"{group.before:.4f}"
                _say(
                    f"  {f'{name} ({group.num_examples} rows)':<28}{before:>9}{group.adapter:>9.4f}"
                    f"{group.exported:>9.4f}"
                )
        if exported.survival is not None:
            _say(f"  {exported.survival:.1%} of the change of the forget rows' loss survives the rounding.")
        if exported.not_measured:
            _say(f"  forget rows: not measured. {exported.not_measured}")
        _say(f"  the same numbers: {self.merged / EXPORT_FILE}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seal:
    """End the possibility to undo an erasure: remove all that restores what was erased, and record what that was.

    Files are overwritten before they are removed. Killed at any moment and started again, it goes on.

    Attributes:
        path: directory that `llmeraser erase` made.
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="out")]

    def run(self) -> int:
        from llmeraser_jax.deletion import SEAL_FILE, seal

        done = seal(self.path)
        _say(f"Sealed: {done.num_files} files removed, {done.num_bytes} bytes. Record: {self.path / SEAL_FILE}")
        for where in done.outside:
            _say(f"  still to be deleted: {where}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undo:
    """Write the adapter as it was before an erasure, bit for bit. Not possible after sealing.

    Attributes:
        path: directory that `llmeraser erase` made.
        workdir: directory to make: the adapter before, in PEFT's format.
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="out")]
    workdir: Path

    def run(self) -> int:
        from llmeraser_jax.deletion import undo

        undo(self.path, self.workdir)
        _say(f"Adapter before the erasure: {self.workdir}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a run directory or a ledger against its own record: hashes, chains, the data, the seal, signatures.

    One line per check. The exit status is 0 where everything is as it should be, else 3.

    Attributes:
        path: directory that finetune, adopt, erase, retrain or queue made.
        data: of a run, more data in which no erased row may be, such as the file that trainings read.
        public_key: the key that must have signed certificates, a PEM file; default: any key, whose fingerprint is
            shown.
    """

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="out")]
    data: Path | None = None
    public_key: Path | None = None

    def run(self) -> int:
        from llmeraser_jax.deletion import verify

        findings = verify(self.path, data_path=self.data, public_key=self.public_key)
        for finding in findings:
            _say(f"{'ok    ' if finding.ok else 'FAILED'}  {finding.name}: {finding.detail}")
        failed = sum(not finding.ok for finding in findings)
        _say(f"{self.path}: {_count(failed, 'check') + ' failed' if failed else 'as it should be'}.")
        return 3 if failed else 0


Command = (
    Annotated[Preview, tyro.conf.subcommand("preview")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Adopt, tyro.conf.subcommand("adopt")]
    | Annotated[RecipeOf, tyro.conf.subcommand("recipe")]
    | Annotated[Erase, tyro.conf.subcommand("erase")]
    | Annotated[Queue, tyro.conf.subcommand("queue")]
    | Annotated[Certify, tyro.conf.subcommand("certify")]
    | Annotated[Retrain, tyro.conf.subcommand("retrain")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Seal, tyro.conf.subcommand("seal")]
    | Annotated[Undo, tyro.conf.subcommand("undo")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


_SHOWN_ROWS = 24  # forget rows on the console; those that have not arrived first


def _tell_rows(receipt: Receipt) -> None:
    """The outcome, every forget row, the others, and the cost."""
    _say(f"  outcome         {receipt.outcome}")
    check, cost = receipt.validity, receipt.gradient_equivalents
    if check is not None:
        _say(f"  {'forget row':<28}{'before':>9}{'target':>9}{'after':>9}   nats per token")
        rows = sorted(check.rows, key=lambda row: row.arrived is not False)
        for row in rows[:_SHOWN_ROWS]:
            target = "?" if row.target is None else f"{row.target:.3f}"
            words = {True: "arrived", False: "NOT ARRIVED", None: "not judged"}[row.arrived]
            copies = f"; the retain set says the same: {', '.join(row.copies)}" if row.copies else ""
            name = f"{row.id[:14]} {row.part}"
            _say(f"  {name:<28}{row.before:>9.3f}{target:>9}{row.after:>9.3f}   {words}{copies}")
        if len(rows) > _SHOWN_ROWS:
            _say(f"  ... and {len(rows) - _SHOWN_ROWS} more in the receipt")
        for name, group in (("retained rows", check.retained), ("calibration rows", check.calibration)):
            if group is not None:
                _say(
                    f"  {name:<18}mean {group.before.mean:.3f} -> {group.after.mean:.3f}, "
                    f"95 % {group.before.percentile_95:.3f} -> {group.after.percentile_95:.3f}, "
                    f"worst rise {group.rise.worst:.3f} ({group.num_rows} rows)"
                )
    share = "" if cost.share_of_retraining is None else f", {cost.share_of_retraining:.2g} of a retraining"
    _say(f"  cost            {cost.total:.0f} gradient equivalents{share}; {receipt.seconds:.1f} s")


def _count(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def _tell_entries(entries) -> None:
    """Entries of a ledger (`deletion.Entry`) as a table."""
    from llmeraser_jax.evaluation.render import Table, render_text

    def state(entry) -> str:
        if entry.outcome is None:
            return f"{entry.state}{', a batch failed' if entry.failure else ''}"
        arrived = list(entry.outcome["arrived"].values())
        return f"done: {arrived.count(True)} of {_count(len(arrived), 'row')} arrived ({entry.outcome['verdict']})"

    header = ("entry", "due", "received", "subject", "requester", "rows", "state")
    rows = tuple(
        (str(e.number), str(e.due), str(e.received), e.subject[:12], e.requester, str(len(e.rows)), state(e))
        for e in entries
    )
    _say(render_text([Table(header, rows)]).rstrip("\n") if rows else "The ledger has no entries.")


def _status(receipt: Receipt) -> int:
    """The exit status of an erasure: 0 complete, 3 incomplete or harmful, 4 not judged."""
    if receipt.complete:
        return 0
    not_judged = receipt.validity is not None and receipt.validity.verdict is Verdict.NOT_JUDGED
    return 4 if not_judged else 3


class _PrintableFormatter(logging.Formatter):
    """Log lines in which a terminal finds nothing to obey, whatever file a name or a text in them is from."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """What tyro reads; the empty name keeps this class out of its messages."""

    command: Annotated[Command, tyro.conf.arg(name="")]


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _log.setLevel(logging.INFO)
    if arguments[:1] == ["--version"]:
        versions = library_versions()
        own = versions.pop("llmeraser-jax") or "(from its source tree)"
        _say(f"llmeraser {own}   ({', '.join(f'{name} {v}' for name, v in versions.items())})")
        return 0
    compile_quickly()
    keep_compiled_programs()
    command = _parse(arguments)
    return guarded(command.run, out_of_memory=_out_of_memory(command))


def guarded(run: Callable[[], int], *, out_of_memory: str = "") -> int:
    """Runs a command; an error is one line on standard error, and the exit status.

    Errors of the user's input or environment name what they are about. Any other exception is a fault of the
    program, and is called so. LLMERASER_DEBUG=1 shows where an exception was raised.

    Args:
        run: the command.
        out_of_memory: what to say where a device has too little memory.
    """
    try:
        with interrupts.raising():
            return run()
    except KeyboardInterrupt as interrupt:
        return interrupts.tell(interrupts.signal_of(interrupt))
    except Exception as error:
        number = interrupts.received()
        if number is not None:  # XLA, for one, makes another exception of it
            return interrupts.tell(number)
        if os.environ.get("LLMERASER_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            raise  # `console` knows what that means
        full = out_of_memory and "RESOURCE_EXHAUSTED" in str(error)
        sys.stderr.write(f"llmeraser: error: {out_of_memory if full else _words(error)}\n")
        return 1


def _words(error: Exception) -> str:
    known = (ValueError, ArithmeticError, OSError, RuntimeError, ImportError, MemoryError)
    if isinstance(error, known) and str(error) and not isinstance(error, RecursionError):
        return bounded(str(error))
    words = bounded(str(error))
    return f"{type(error).__name__}{': ' if words else ''}{words} (LLMERASER_DEBUG=1 shows where; please report it)"


def _parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments state; wrong flags end the program with a suggestion."""

    def parse(these: Sequence[str]) -> Command:
        return tyro.cli(
            tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[_Arguments]],
            prog="llmeraser",
            args=these,
            description=_DESCRIPTION,
            registry=_registry(),
        ).command

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return parse(arguments)
    except SystemExit:
        sys.stderr.write(told.getvalue())
        for unknown, known in _suggestions(arguments, parse) if "Unrecognized" in told.getvalue() else ():
            if f"    {known}" not in told.getvalue():  # tyro suggests flags itself, where none is missing
                sys.stderr.write(f"llmeraser: {printable(unknown, keep='')} is unknown; did you mean {known}?\n")
        raise


def _suggestions(arguments: Sequence[str], parse: Callable[[Sequence[str]], object]) -> list[tuple[str, str]]:
    """Arguments that help does not know, each with the most similar one that it knows."""
    words: list[str] = []

    def help_of(*commands: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            parse([*commands, "--help"])
        return shown.getvalue()

    text = help_of()
    commands = _choices(text)
    for argument in arguments:
        if argument in commands:
            words.append(argument)
            text = help_of(*words) + text
            commands = _choices(text)
    flags = set(re.findall(r"--[a-z][a-z0-9-]*", text))
    found = []
    for argument in arguments:
        is_flag = argument.startswith("--")
        name = argument.partition("=")[0]
        known = flags if is_flag else set(_choices(text))
        first_word = not is_flag and not words and argument == arguments[0]
        if name not in known and ((is_flag and words) or first_word):
            found += [(name, match) for match in difflib.get_close_matches(name, sorted(known), n=1)]
    return found


def _choices(help_text: str) -> list[str]:
    """The sub-commands in braces that a usage line ends with."""
    braces = re.search(r"^usage:[^{]*\{([^}]*)\}", help_text)
    return [] if braces is None else [word.strip() for word in braces[1].split(",")]


def _out_of_memory(command: Command) -> str:
    """What to change, where a device has too little memory."""
    flags = {Finetune: "set a smaller --microbatch-size, ", Erase: "set a smaller --chunk-size, "}
    mesh = command.devices.mesh if isinstance(command, Finetune | Adopt | Erase | Retrain | Evaluate) else ""
    more = "more" if mesh else "several"
    return (
        f"A device ran out of memory. {flags.get(type(command), '').capitalize()}share the base out over {more} "
        "devices (--mesh fsdp=8), or store it in --dtype bfloat16 or quantised; llmeraser plan says what fits."
    )


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Tables are given as JSON, modules as names or an expression; solvers, trust regions and methods as words."""
    registry = tyro.constructors.ConstructorRegistry()
    words = {
        Solver: ("NAME[:OPTION=VALUE,...]", read_solver),
        TrustRegion: ("OPTION=VALUE,...", read_trust_region),
        TrustRegion | None: ("none|OPTION=VALUE,...", read_trust_region),
        Mover: ("METHOD", read_method),
    }

    @registry.primitive_rule
    def rule(type_info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if type_info.type_origin is Mapping:
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="JSON",
                instance_from_str=lambda given: json.loads(given[0]),
                is_instance=lambda value: isinstance(value, Mapping),
                str_from_instance=lambda value: [json.dumps(dict(value))],
            )
        if type_info.type not in words:
            return None
        metavar, read = words[type_info.type]
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda given: read(given[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [write(value)],
        )

    @registry.primitive_rule
    def modules(
        type_info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        """Names of modules, or one regular expression: what has a character that no name has."""
        choices = set(get_args(type_info.type))
        if choices - {type(None)} != {tuple[str, ...], str}:
            return None
        optional = type(None) in choices

        def parse(given: list[str]) -> tuple[str, ...] | str | None:
            if optional and given == ["None"]:
                return None
            (first, *others) = given
            return (
                first if not others and (first == "all-linear" or set(first) & set(r"\*+?()[]{}|^$")) else (*given,)
            )

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="None | NAME [NAME ...] | REGEX" if optional else "NAME [NAME ...] | REGEX | all-linear",
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, str | tuple) or (optional and value is None),
            str_from_instance=lambda value: list(value) if isinstance(value, tuple) else [str(value)],
        )

    return registry


_DESCRIPTION = (
    "Make a LoRA-tuned language model forget: influence functions give the adapter's change for examples that "
    "are removed or edited, at a fraction of retraining's cost. llmeraser --version says what is installed."
)


def console() -> None:
    """The console script."""
    interrupts.install()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    number = interrupts.received()
    if number is not None and status < 128:  # it was lost, and the command went on to its end
        status = interrupts.tell(number)
    # An orderly exit ends some programs with a segmentation fault where XLA's threads still work. On a pod it would
    # wait for the others, and they may be waiting for this process's share of a sum.
    if status >= 128 or (status == 1 and jax.distributed.is_initialized()):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    console()
