"""Methods, solvers and trust regions as one word, for flags and files: `cg:rtol=0.05,max_steps=15`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmeraser_jax.solvers import ConjugateGradients, Lissa, Minres, QuadraticDescent, ReferenceCompat
from llmeraser_jax.types import Solver
from llmeraser_jax.unlearning import (
    METHODS,
    KroneckerPreconditioner,
    RowPreconditioner,
    TrustRegion,
)
from llmeraser_jax.unlearning.judged import Mover

SOLVERS: Mapping[str, Solver] = {
    "cg": ConjugateGradients(rtol=0.05, max_steps=15),
    "minres": Minres(rtol=0.05, max_steps=15),
    "descent": QuadraticDescent(rtol=0.05),
    "lissa": Lissa(rtol=0.05),
    "public-script": ReferenceCompat(seed=0),
}
_NOT_WRITTEN = ("while_loop", "preconditioner", "radius")
PRECONDITIONERS = ("rows", "kronecker")


def read_solver(text: str) -> Solver:
    """A solver from `NAME` or `NAME:option=value,...`.

    Conjugate gradients also take `preconditioner=rows` or `preconditioner=kronecker`, with `num_roots`, and for the
    latter `factors`, the directory that the factors are read from or saved in.

    Raises:
        ValueError: the text is none; says what is known.
    """
    name, options = _split(text, SOLVERS, "solver")
    preconditioner = None
    if name == "cg" and "preconditioner" in options:
        kind = options.pop("preconditioner")
        if kind not in PRECONDITIONERS:
            msg = f"preconditioner is {kind!r}; it must be one of {', '.join(PRECONDITIONERS)}."
            raise ValueError(msg)
        preconditioner = RowPreconditioner() if kind == "rows" else KroneckerPreconditioner()
        if "num_roots" in options:
            preconditioner = dataclasses.replace(preconditioner, num_roots=_number(options.pop("num_roots")))
        if isinstance(preconditioner, KroneckerPreconditioner):
            options.setdefault("max_steps", "1")
            if "factors" in options:
                preconditioner = dataclasses.replace(preconditioner, directory=Path(options.pop("factors")))
    solver: Any = _replaced(SOLVERS[name], options, _NOT_WRITTEN)
    return solver if preconditioner is None else dataclasses.replace(solver, preconditioner=preconditioner)


def read_trust_region(text: str) -> TrustRegion | None:
    """A trust region from `none`, `default`, or `option=value,...`.

    Raises:
        ValueError: the text is none; says what is known.
    """
    if text == "none":
        return None
    return _replaced(TrustRegion(), {} if text == "default" else _options(text, text))


def read_method(text: str) -> Mover:
    """One of the package's own methods, from its name.

    Raises:
        ValueError: there is none of that name; the names are listed.
    """
    movers = {name: method for name, method in METHODS.items() if isinstance(method, Mover)}
    if text not in movers:
        msg = f"There is no method {text!r}; there are {', '.join(movers)}."
        raise ValueError(msg)
    return movers[text]


def write(value: Any) -> str:
    """The word that one of the readers turns into `value`."""
    if value is None:
        return "none"
    if isinstance(value, TrustRegion):
        return _written(value, TrustRegion()) or "default"
    for name, method in METHODS.items():
        if value == method:
            return name
    for name, solver in SOLVERS.items():
        if type(value) is type(solver):
            options = _written(value, solver)
            return f"{name}:{options}" if options else name
    return repr(value)


def _split(text: str, known: Mapping[str, Any], what: str) -> tuple[str, dict[str, str]]:
    name, _, rest = text.partition(":")
    if name not in known:
        msg = f"There is no {what} {name!r}; there are {', '.join(known)}."
        raise ValueError(msg)
    return name, _options(rest, text)


def _options(rest: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key in options:
            msg = f"{text!r} is not understood at {part!r}; write option=value, each option once."
            raise ValueError(msg)
        options[key.strip().replace("-", "_")] = value.strip()
    return options


def _replaced(start: Any, options: Mapping[str, str], hidden: tuple[str, ...] = ()) -> Any:
    names = [field.name for field in dataclasses.fields(start) if field.name not in hidden]
    unknown = [name for name in options if name not in names]
    if unknown:
        msg = f"{type(start).__name__} has no option {unknown[0]!r}; it has {', '.join(names)}."
        raise ValueError(msg)
    return dataclasses.replace(start, **{name: _number(value) for name, value in options.items()})


def _number(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _written(value: Any, default: Any) -> str:
    changed = [
        f"{field.name}={getattr(value, field.name)}"
        for field in dataclasses.fields(value)
        if field.name not in _NOT_WRITTEN and getattr(value, field.name) != getattr(default, field.name)
    ]
    return ",".join(changed)
