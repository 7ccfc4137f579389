"""Curvature matrices as operators: products with vectors, never the matrix."""

from llmeraser_jax.curvature.damping import Damped
from llmeraser_jax.curvature.dense import DenseOperator, materialise
from llmeraser_jax.curvature.gauss_newton import gauss_newton_product
from llmeraser_jax.curvature.hessian import hessian_product
from llmeraser_jax.curvature.operators import (
    CURVATURES,
    Curvature,
    DatasetCurvature,
    product_asymmetry,
)

__all__ = [
    "CURVATURES",
    "Curvature",
    "Damped",
    "DatasetCurvature",
    "DenseOperator",
    "gauss_newton_product",
    "hessian_product",
    "materialise",
    "product_asymmetry",
]
