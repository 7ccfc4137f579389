"""Sums of matrix products as one product: `A B + C D = [A C] [B; D]`.

The tangent of a product is such a sum, so that a curvature product is full of them. Where the matrices that are
multiplied are thin (the rank of an adapter, the width of an attention head) and the result is not (tokens by the
width of a layer, pairs of tokens), computing takes less time than writing and adding two results: measured in
`experiments/benchmarks`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.extend.core.primitives import add_jaxvals_p, add_p, dot_general_p

from llmeraser_jax.curvature.programs import equations_of, rewrite_program


def merge_thin_products(fn: Callable) -> Callable:
    """`fn` with sums of thin matrix products computed as one product each; its values change by rounding only.

    Products are thin when their operands together have no more numbers than their result. Applied to the finished
    program, loops, branches and calls inside it included; a derivative of the result has sums of its own.

    Args:
        fn: a pure function of pytrees of arrays.
    """
    return rewrite_program(fn, _merge)


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A sum that nothing else reads the parts of.

    Attributes:
        additions: indices of the equations that make it, the first of which defines it.
        groups: thin products, by index of their equations; those of a group contract alike, two or more of them.
        others: what else is added.
    """

    additions: list[int]
    groups: list[list[int]]
    others: list[Any]


def _merge(jaxpr: core.Jaxpr) -> core.Jaxpr:
    sums = _mergeable_sums(jaxpr)
    merged = {found.additions[0]: found for found in sums}
    gone = {i for found in sums for i in (*found.additions, *(i for group in found.groups for i in group))}
    equations = []
    for i, equation in enumerate(jaxpr.eqns):
        if i in merged:
            equations.extend(_equations_of_sum(jaxpr, merged[i], equation.outvars[0]))
        elif i not in gone:
            equations.append(equation)
    return jaxpr.replace(eqns=equations)


def _mergeable_sums(jaxpr: core.Jaxpr) -> list[_Sum]:
    read = [atom for equation in jaxpr.eqns for atom in equation.invars] + list(jaxpr.outvars)
    uses = Counter(atom for atom in read if isinstance(atom, core.Var))
    # By variable, what defines it: only variables that one equation reads, once.
    only_here = {
        equation.outvars[0]: i
        for i, equation in enumerate(jaxpr.eqns)
        if len(equation.outvars) == 1 and uses[equation.outvars[0]] == 1
    }

    def defined_by(atom):
        return only_here.get(atom) if isinstance(atom, core.Var) else None

    additions = {i for i, equation in enumerate(jaxpr.eqns) if _is_addition(equation)}
    parts_of_sums = {defined_by(atom) for i in additions for atom in jaxpr.eqns[i].invars} & additions

    sums = []
    for root in sorted(additions - parts_of_sums):
        tree, leaves = [root], []
        for i in tree:  # grows
            for atom in jaxpr.eqns[i].invars:
                part = defined_by(atom)
                if part is not None and part in parts_of_sums:
                    tree.append(part)
                else:
                    leaves.append(atom)
        alike = defaultdict(list)
        for atom in leaves:
            product = defined_by(atom)
            if product is not None and _is_thin_product(jaxpr.eqns[product]):
                alike[_contraction(jaxpr.eqns[product])].append(product)
        groups = [group for group in alike.values() if len(group) > 1]
        if groups:
            taken = {product for group in groups for product in group}
            sums.append(_Sum(tree, groups, [atom for atom in leaves if defined_by(atom) not in taken]))
    return sums


def _avals(atoms) -> list[Any]:
    return [atom.aval for atom in atoms]


def _is_addition(equation: core.JaxprEqn) -> bool:
    if equation.primitive not in (add_p, add_jaxvals_p):
        return False
    return len({(aval.shape, aval.dtype) for aval in _avals((*equation.invars, *equation.outvars))}) == 1


def _is_thin_product(equation: core.JaxprEqn) -> bool:
    if equation.primitive is not dot_general_p:
        return False
    (contracted, _), _ = equation.params["dimension_numbers"]
    operands = sum(aval.size for aval in _avals(equation.invars))
    return len(contracted) == 1 and operands <= _avals(equation.outvars)[0].size


def _contraction(equation: core.JaxprEqn) -> Any:
    """What products that are merged have in common, besides the shape of the result."""
    params = {name: str(value) for name, value in equation.params.items()}
    return (*sorted(params.items()), *(aval.dtype for aval in _avals(equation.invars)))


def _equations_of_sum(jaxpr: core.Jaxpr, found: _Sum, output: core.Var) -> list[core.JaxprEqn]:
    first = [jaxpr.eqns[group[0]] for group in found.groups]
    inputs = [atom for group in found.groups for i in group for atom in jaxpr.eqns[i].invars] + found.others

    def total(*values):
        values = list(values)
        terms = []
        for group, equation in zip(found.groups, first, strict=True):
            operands, values = values[: 2 * len(group)], values[2 * len(group) :]
            ((left,), (right,)), _ = equation.params["dimension_numbers"]
            joined = jax.lax.concatenate(operands[::2], left), jax.lax.concatenate(operands[1::2], right)
            terms.append(dot_general_p.bind(*joined, **equation.params))
        terms += values
        result = terms[0]
        for term in terms[1:]:
            result = jax.lax.add(result, term)
        return result

    return equations_of(total, inputs, output)
