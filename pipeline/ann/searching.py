"""What widens a search, as parameters of one call: an index that is open is never changed, so threads may share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.ann.parts import inverted_lists, split

Search = dict[str, int]
"""FAISS's own names: nprobe of inverted lists, k_factor of re-ranking, efSearch of a graph."""
_BY_GRAPH, _FEWEST_BY_GRAPH = 2, 32
"""A graph of centroids is searched so many times as wide as lists are wanted, and so wide at the least."""
_BY_CODES, _FEWEST_BY_CODES = 4, 128
"""Of the centroids that are near by their codes so many times as lists are wanted are compared whole, and so many at
the least."""
FOR_ONE_BY_CODES = 16
"""So many for a single list."""
K_FACTORS = (1, 2, 4, 8, 16, 32, 64)
MORE_K_FACTORS = (128, 256, 512)
"""For vectors that codes tell badly apart, as of those that point anywhere: of 10 million such with 128 dimensions all
lists and 64 times k found 0.947."""


def unsearchable(vectors: NDArray[np.float32]) -> tuple[int, int, str]:
    """How many of the vectors [n, d] no search can find or be made with; which is the first, and what it is."""
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
    if not len(bad):
        return 0, -1, ""
    return len(bad), int(bad[0]), "all zeros" if squares[bad[0]] == 0 else "not finite"


def widths(index: faiss.Index) -> tuple[str, list[int]]:
    """The parameter that widens this kind of index's first search, and the values to try, narrow first."""
    base, _ = split(index)
    lists = inverted_lists(index)
    if lists is not None:
        nlist = int(lists.nlist)
        return "nprobe", [*(2**power for power in range(nlist.bit_length()) if 2**power < nlist), nlist]
    if isinstance(base, faiss.IndexHNSW):
        return "efSearch", [2**power for power in range(4, 13)]
    return "", [0]


def k_factors(index: faiss.Index) -> Sequence[int]:
    """How many times k may be taken to be re-ranked; empty for an index that does not re-rank."""
    return K_FACTORS if split(index)[1] is not None else ()


def more_k_factors(index: faiss.Index) -> Sequence[int]:
    """As k_factors, for what none of these is enough for, fewest first."""
    return MORE_K_FACTORS if k_factors(index) else ()


def takes_selectors(index: faiss.Index) -> bool:
    """Whether FAISS can be told what not to find: not of 4-bit blocks and product quantizers without lists."""
    return not isinstance(split(index)[0], (faiss.IndexPQ, faiss.IndexFastScan))


def parameters(index: faiss.Index, search: Search, selector: Any = None) -> faiss.SearchParameters | None:
    """A call's parameters; selector is a faiss.IDSelector or None. The caller keeps the selector alive."""
    base, refine = split(index)
    chosen = {} if selector is None else {"sel": selector}
    lists = inverted_lists(index)
    if lists is not None:
        nprobe = search.get("nprobe", 1)
        found_by = list_parameters(lists, nprobe)
        if found_by is not None:
            chosen["quantizer_params"] = found_by
        inner = faiss.SearchParametersIVF(nprobe=nprobe, **chosen)
        if isinstance(base, faiss.IndexPreTransform):
            inner = faiss.SearchParametersPreTransform(index_params=inner)
    elif isinstance(base, faiss.IndexHNSW):
        inner = faiss.SearchParametersHNSW(efSearch=search.get("efSearch", 16), **chosen)
    elif chosen:
        inner = faiss.SearchParameters(**chosen)
    else:
        inner = None
    if refine is None:
        return inner
    return faiss.IndexRefineSearchParameters(k_factor=float(search.get("k_factor", 1)), base_index_params=inner)


def list_parameters(lists: faiss.IndexIVF, nprobe: int) -> faiss.SearchParameters | None:
    """How the nearest lists are looked for; None where all centroids are compared.

    By codes of 16 384 centroids, 4 times as many compared whole, 99.9 % of the nearest 64 or 128 are found, in 59 and
    90 us; a graph searched twice as wide as lists are wanted finds 99.5 % in 144 and 269. By FAISS's own width of 16 it
    found 38 % of the nearest 512.
    """
    quantizer = faiss.downcast_index(lists.quantizer)
    if isinstance(quantizer, faiss.IndexRefine):
        compared = min(int(lists.nlist), max(_FEWEST_BY_CODES, _BY_CODES * nprobe))
        return faiss.IndexRefineSearchParameters(k_factor=max(1.0, compared / nprobe))
    if isinstance(quantizer, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(_FEWEST_BY_GRAPH, _BY_GRAPH * nprobe))
    return None


def compared(
    index: faiss.Index, queries: NDArray[np.float32], search: Search, sizes: NDArray[np.int64] | None
) -> float:
    """Vectors that a query is compared with on average, from the sizes of the lists [nlist] that it probes."""
    lists = inverted_lists(index)
    if lists is None or sizes is None:
        return float(index.ntotal)
    base, _ = split(index)
    if isinstance(base, faiss.IndexPreTransform):
        for place in range(base.chain.size()):
            queries = faiss.downcast_VectorTransform(base.chain.at(place)).apply(queries)
    nprobe = search["nprobe"]
    probed = lists.quantizer.search(queries, nprobe, params=list_parameters(lists, nprobe))[1]
    return float(np.where(probed >= 0, sizes[probed], 0).sum(axis=1).mean())
