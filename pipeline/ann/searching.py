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
K_FACTORS = (1, 2, 4, 8, 16, 32, 64)


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


def parameters(index: faiss.Index, search: Search, selector: Any = None) -> faiss.SearchParameters | None:
    """A call's parameters; selector is a faiss.IDSelector or None. The caller keeps the selector alive."""
    base, refine = split(index)
    chosen = {} if selector is None else {"sel": selector}
    lists = inverted_lists(index)
    if lists is not None:
        inner = faiss.SearchParametersIVF(nprobe=search.get("nprobe", 1), **chosen)
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
    probed = lists.quantizer.search(queries, search["nprobe"])[1]
    return float(np.where(probed >= 0, sizes[probed], 0).sum(axis=1).mean())
