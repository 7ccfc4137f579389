"""Make a LoRA-tuned language model forget: influence-function unlearning in JAX.

A model was fine-tuned with LoRA; then some training examples are to be removed, their queries changed or their
responses corrected. Influence functions give the adapter's change without retraining:

    import llmeraser_jax as le

    model = le.load_model("path/to/base")                       # Hugging Face layout
    lora = le.load_adapter("path/to/adapter", model)            # PEFT's format
    examples = le.load_examples("train.jsonl")
    dataset = le.encode_examples(examples, le.Recipe(), model.tokenizer)
    requests = le.load_requests("requests.jsonl", examples)
    result = le.erase(model, lora, dataset, requests, le.EraseConfig(l2=1e-3))
    le.save_adapter("path/to/new_adapter", result.lora, model)

`result.receipt` says what was done and how far to trust it. From files to files, with everything recorded, the
same is done by the functions that end in `_run` and by the console script `llmeraser`.
"""

from llmeraser_jax.baselines import retrain
from llmeraser_jax.curvature import CURVATURES, Damped, DatasetCurvature
from llmeraser_jax.data import (
    Action,
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
from llmeraser_jax.evaluation import gap_closure, summarise
from llmeraser_jax.evaluation.job import evaluate_runs, write_report
from llmeraser_jax.lora import Lora, LoraConfig, add_delta, load_adapter, merge_lora, save_adapter
from llmeraser_jax.losses import Objective, gradient_sum, lm_objective, loss_sum
from llmeraser_jax.models import Model, ModelConfig, generate, init_base, load_model, save_model
from llmeraser_jax.parallel import make_mesh
from llmeraser_jax.runs import Run, RunError, load_run
from llmeraser_jax.solvers import ConjugateGradients, Status
from llmeraser_jax.training import TrainConfig, finetune
from llmeraser_jax.training.adopt import adopt
from llmeraser_jax.training.job import finetune_run
from llmeraser_jax.types import ExampleSet, ExampleStack, Operator, Solution, Solver, TokenBatch
from llmeraser_jax.unlearning import EraseConfig, EraseResult, Receipt, UnlearningError, erase, erase_run, unlearn

__all__ = [
    "CURVATURES",
    "Action",
    "ConjugateGradients",
    "Damped",
    "DatasetCurvature",
    "EraseConfig",
    "EraseResult",
    "Example",
    "ExampleSet",
    "ExampleStack",
    "Lora",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "Objective",
    "Operator",
    "Receipt",
    "Recipe",
    "Request",
    "RequestError",
    "Run",
    "RunError",
    "Solution",
    "Solver",
    "Status",
    "TokenBatch",
    "TokenDataset",
    "TrainConfig",
    "UnlearningError",
    "add_delta",
    "adopt",
    "apply_requests",
    "encode_examples",
    "erase",
    "erase_run",
    "evaluate_runs",
    "finetune",
    "finetune_run",
    "gap_closure",
    "generate",
    "gradient_sum",
    "init_base",
    "lm_objective",
    "load_adapter",
    "load_examples",
    "load_model",
    "load_requests",
    "load_run",
    "loss_sum",
    "make_mesh",
    "merge_lora",
    "retrain",
    "save_adapter",
    "save_examples",
    "save_model",
    "summarise",
    "unlearn",
    "write_report",
]
