"""How much the texts of examples have in common: what needs no pass through a network to guess who is affected."""

from __future__ import annotations

import numpy as np
import scipy.sparse
from jaxtyping import Int

from llmeraser_jax.data.encoding import TokenDataset


def find_look_alikes(
    dataset: TokenDataset, named: np.ndarray, among: np.ndarray, *, least: float = 0.5, at_most: int = 3
) -> tuple[Int[np.ndarray, " found"], ...]:
    """For every named example the others whose texts are most like its own.

    Tokens that every example has (the template's) weigh nothing, rare ones (names, titles) the most.

    Args:
        dataset: encoded examples.
        named: [s] indices of examples.
        among: [k] indices of the examples to look through.
        least: the cosine of TF-IDF vectors of token counts from which two texts are alike.
        at_most: examples for each named one.

    Returns:
        Per named example the indices of its look-alikes, most alike first.
    """
    vectors = _text_vectors(dataset)
    cosines = (vectors[np.asarray(named)] @ vectors[np.asarray(among)].T).toarray()
    found = []
    for row in cosines:
        nearest = np.argsort(-row, kind="stable")[:at_most]
        found.append(np.asarray(among)[nearest[row[nearest] >= least]].astype(np.int64))
    return tuple(found)


def _text_vectors(dataset: TokenDataset) -> scipy.sparse.csr_array:
    """TF-IDF vectors of token counts, of length one."""
    tokens = [np.asarray(example.tokens) for example in dataset.encoded]
    lengths = np.array([len(row) for row in tokens])
    rows = np.repeat(np.arange(len(tokens)), lengths)
    columns = np.concatenate(tokens)
    shape = (len(tokens), int(columns.max()) + 1)
    counts = scipy.sparse.csr_array((np.ones(len(columns)), (rows, columns)), shape=shape)
    counts.sum_duplicates()
    document_counts = np.maximum(np.bincount(counts.indices, minlength=shape[1]), 1)
    inverse_frequency = np.log(len(tokens) / document_counts)
    # Sublinear term frequency times inverse document frequency, entry by entry.
    values = (1 + np.log(counts.data)) * inverse_frequency[counts.indices]
    row_of = np.repeat(np.arange(len(tokens)), np.diff(counts.indptr))
    norms = np.sqrt(np.bincount(row_of, values**2, minlength=len(tokens)))
    values /= np.where(norms > 0, norms, 1)[row_of]
    return scipy.sparse.csr_array((values, counts.indices, counts.indptr), shape=shape)
