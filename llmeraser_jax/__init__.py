"""Make a LoRA-tuned language model forget: influence-function unlearning in JAX.

A model was fine-tuned with LoRA; then some training examples are to be removed, their queries changed or their
responses corrected. Influence functions give the adapter's change without retraining:

    import llmeraser_jax as le

    model = le.load_model("path/to/base")                       # Hugging Face layout
    adapter = le.load_adapter("path/to/adapter", model)         # PEFT's format
    examples = le.load_examples("train.jsonl")
    task = le.UnlearningTask(
        model=model,
        adapter=adapter,
        data=le.encode_examples(examples, le.Recipe(), model.tokenizer),
        requests=le.load_requests("requests.jsonl", examples),
        training=le.TrainConfig(epochs=3, l2=1e-3),             # as the adapter was trained
    )
    result = le.erase(task)                                     # or le.erase(task, le.Path(num_steps=8))
    le.save_adapter("path/to/new_adapter", result.params, model)

`result.receipt` says what was done and how far to trust it. From files to files, with everything recorded, the
same is done by the functions that end in `_run` and by the console script `llmeraser`. The mathematics is in
`le.curvature` and `le.solvers`, measuring in `le.evaluation`, methods to compare with in `le.rivals`.
"""

from llmeraser_jax import interrupts

if interrupts.is_console():  # before the imports that take seconds
    interrupts.install()

from typing import TYPE_CHECKING, Any

from llmeraser_jax import curvature, evaluation, rivals, solvers
from llmeraser_jax.data import (
    Action,
    ArrayExamples,
    Example,
    Recipe,
    Request,
    RequestError,
    TokenDataset,
    apply_requests,
    encode_examples,
    load_examples,
    load_requests,
    save_examples,
)
from llmeraser_jax.lora import Lora, LoraConfig, add_delta, load_adapter, merge_lora, save_adapter
from llmeraser_jax.losses import Objective, lm_objective
from llmeraser_jax.models import Model, ModelConfig, generate, init_base, load_model, save_model
from llmeraser_jax.parallel import make_mesh
from llmeraser_jax.runs import Run, RunError, load_run
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.training.adopt import adopt
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.training.retrain import retrain
from llmeraser_jax.types import ExampleSet, ExampleStack, TokenBatch
from llmeraser_jax.unlearning import (
    PAPER_DESCENT,
    PAPER_STEP,
    PUBLIC_SCRIPT,
    Auto,
    Corrected,
    CurvatureSpec,
    EditProblem,
    Method,
    Path,
    Receipt,
    Result,
    Step,
    TargetMatching,
    TrustRegion,
    UnlearningError,
    UnlearningTask,
    Workspace,
    erase,
    erase_run,
    task_of_run,
)

if TYPE_CHECKING:
    from llmeraser_jax.evaluation.job import evaluate_runs, write_report


def __getattr__(name: str) -> Any:
    """What draws pages is imported where it is asked for: matplotlib takes as long as JAX."""
    if name not in ("evaluate_runs", "write_report"):
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from llmeraser_jax.evaluation import job

    return getattr(job, name)


__all__ = [
    "PAPER_DESCENT",
    "PAPER_STEP",
    "PUBLIC_SCRIPT",
    "Action",
    "ArrayExamples",
    "Auto",
    "Corrected",
    "CurvatureSpec",
    "EditProblem",
    "Example",
    "ExampleSet",
    "ExampleStack",
    "Lora",
    "LoraConfig",
    "Method",
    "Model",
    "ModelConfig",
    "Objective",
    "Path",
    "Receipt",
    "Recipe",
    "Request",
    "RequestError",
    "Result",
    "Run",
    "RunError",
    "Step",
    "TargetMatching",
    "TokenBatch",
    "TokenDataset",
    "TrainConfig",
    "TrustRegion",
    "UnlearningError",
    "UnlearningTask",
    "Workspace",
    "add_delta",
    "adopt",
    "apply_requests",
    "curvature",
    "encode_examples",
    "erase",
    "erase_run",
    "evaluate_runs",
    "evaluation",
    "finetune",
    "finetune_run",
    "generate",
    "init_base",
    "lm_objective",
    "load_adapter",
    "load_examples",
    "load_model",
    "load_requests",
    "load_run",
    "make_mesh",
    "merge_lora",
    "retrain",
    "rivals",
    "save_adapter",
    "save_examples",
    "save_model",
    "solvers",
    "task_of_run",
    "write_report",
]
