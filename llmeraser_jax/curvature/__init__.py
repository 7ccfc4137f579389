"""Curvature matrices as operators: products with vectors, never the matrix."""

from llmeraser_jax.curvature.damping import (
    BlockDamped,
    Damped,
    block_mean_eigenvalues,
    damping_product,
    mean_eigenvalue,
    relative_damping,
    stacked_axes,
)
from llmeraser_jax.curvature.dense import DenseOperator, materialise
from llmeraser_jax.curvature.empirical_fisher import empirical_fisher_product
from llmeraser_jax.curvature.gauss_newton import gauss_newton_product
from llmeraser_jax.curvature.hessian import hessian_product
from llmeraser_jax.curvature.kfac import EkFac, KroneckerFactors, ekfac, example_factors, load_ekfac, save_ekfac
from llmeraser_jax.curvature.linearised import (
    LinearisedCurvature,
    choose_linearisation,
    linearisation_bytes,
    make_linearised,
    product_cost,
)
from llmeraser_jax.curvature.merging import merge_thin_products
from llmeraser_jax.curvature.narrow import NarrowProducts, narrow_products
from llmeraser_jax.curvature.operators import (
    CURVATURES,
    Curvature,
    DatasetCurvature,
    mv_many,
    product_asymmetry,
)
from llmeraser_jax.curvature.spectrum import largest_term_eigenvalue

__all__ = [
    "CURVATURES",
    "BlockDamped",
    "Curvature",
    "Damped",
    "DatasetCurvature",
    "DenseOperator",
    "EkFac",
    "KroneckerFactors",
    "LinearisedCurvature",
    "NarrowProducts",
    "block_mean_eigenvalues",
    "choose_linearisation",
    "damping_product",
    "ekfac",
    "empirical_fisher_product",
    "example_factors",
    "gauss_newton_product",
    "hessian_product",
    "largest_term_eigenvalue",
    "linearisation_bytes",
    "load_ekfac",
    "make_linearised",
    "materialise",
    "mean_eigenvalue",
    "merge_thin_products",
    "mv_many",
    "narrow_products",
    "product_asymmetry",
    "product_cost",
    "relative_damping",
    "save_ekfac",
    "stacked_axes",
]
