"""Curvature matrices as operators: products with vectors, never the matrix."""

from llmeraser_jax.curvature.bfloat16 import Bfloat16Products
from llmeraser_jax.curvature.damping import (
    Damped,
    block_mean_eigenvalues,
    damping_product,
    mean_eigenvalue,
    relative_damping,
    stacked_axes,
)
from llmeraser_jax.curvature.dual import BlockCurvature, DualInverse, factorise
from llmeraser_jax.curvature.empirical_fisher import empirical_fisher_product
from llmeraser_jax.curvature.factor import (
    ExampleRows,
    FactoredCurvature,
    example_rows,
    factored_curvature,
    stacked_weights,
)
from llmeraser_jax.curvature.gauss_newton import gauss_newton_product
from llmeraser_jax.curvature.hessian import hessian_product
from llmeraser_jax.curvature.kfac import EkFac, KroneckerFactors, ekfac, example_factors, load_ekfac, save_ekfac
from llmeraser_jax.curvature.linearised import (
    CACHED_PRODUCT_COST,
    LinearisedCurvature,
    linearisation_bytes,
    linearise,
)
from llmeraser_jax.curvature.operators import CURVATURES, Curvature, DatasetCurvature, product_asymmetry
from llmeraser_jax.curvature.row_blocks import RowBlocks
from llmeraser_jax.curvature.spectrum import largest_term_eigenvalue
from llmeraser_jax.curvature.streamed import StreamedOperator, streamed_operator
from llmeraser_jax.curvature.taps import token_factors

__all__ = [
    "CACHED_PRODUCT_COST",
    "CURVATURES",
    "Bfloat16Products",
    "BlockCurvature",
    "Curvature",
    "Damped",
    "DatasetCurvature",
    "DualInverse",
    "EkFac",
    "ExampleRows",
    "FactoredCurvature",
    "KroneckerFactors",
    "LinearisedCurvature",
    "RowBlocks",
    "StreamedOperator",
    "block_mean_eigenvalues",
    "damping_product",
    "ekfac",
    "empirical_fisher_product",
    "example_factors",
    "example_rows",
    "factored_curvature",
    "factorise",
    "gauss_newton_product",
    "hessian_product",
    "largest_term_eigenvalue",
    "linearisation_bytes",
    "linearise",
    "load_ekfac",
    "mean_eigenvalue",
    "product_asymmetry",
    "relative_damping",
    "save_ekfac",
    "stacked_axes",
    "stacked_weights",
    "streamed_operator",
    "token_factors",
]
