"""Indexes in parts: what FAISS can fill side by side and merge, and how, to the same bytes however it was cut.

An IVF index takes explicit ids; a flat one is merged in the order of the rows. A refined index (`...,Refine(...)`)
cannot be merged by FAISS: its base and its re-ranking vectors are, each for itself. A part is a copy of the trained,
empty index with a run of rows in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import faiss
import numpy as np

from pipeline.ann.devices import Floats, ListFinder


def split(index: faiss.Index) -> tuple[faiss.Index, faiss.Index | None]:
    """The index that is searched first, and the one whose vectors re-rank what it finds, if there is one."""
    if isinstance(index, faiss.IndexRefine):
        return faiss.downcast_index(index.base_index), faiss.downcast_index(index.refine_index)
    return index, None


def inverted_lists(index: faiss.Index) -> faiss.IndexIVF | None:
    """The IVF part of an index, also inside a refined or transformed one; None if it has none."""
    found = faiss.try_extract_index_ivf(split(index)[0])
    return None if found is None else faiss.downcast_index(found)


def outer_lists(index: faiss.Index) -> faiss.IndexIVF | None:
    """The IVF index that vectors meet as they are, without a transformation before it; None if there is none."""
    base, _ = split(index)
    return base if isinstance(base, faiss.IndexIVF) else None


def can_be_merged(index: faiss.Index) -> bool:
    """Whether parts of such an index make a whole; those of a graph (HNSW) do not: it is built in one process."""
    base, refine = split(index)
    in_blocks = isinstance(inverted_lists(index), faiss.IndexIVFFastScan)
    if in_blocks and not isinstance(base, faiss.IndexIVFPQFastScan):
        return False
    has_parts = inverted_lists(index) is not None or isinstance(base, faiss.IndexFlatCodes)
    return has_parts and (refine is None or isinstance(refine, faiss.IndexFlatCodes))


def can_lie_on_disk(index: faiss.Index) -> bool:
    """Whether FAISS can keep the lists in a file of their own: not 4-bit codes in blocks, not a refined index."""
    lists = inverted_lists(index)
    return lists is not None and split(index)[1] is None and not isinstance(lists, faiss.IndexIVFFastScan)


def fill(index: faiss.Index, vectors: Floats, first: int, finder: ListFinder | None) -> None:
    """Add rows [first, first + n) of the catalogue; finder, if given, says which list each goes to."""
    base, refine = split(index)
    ids = np.arange(first, first + len(vectors), dtype=np.int64)
    if finder is not None:
        found = np.ascontiguousarray(finder.find(vectors))  # named: FAISS gets bare pointers
        base.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(found))
    elif inverted_lists(index) is not None:
        base.add_with_ids(vectors, ids)
    else:
        base.add(vectors)
    if refine is not None:
        refine.add(vectors)
        index.ntotal = base.ntotal


def loosen(trained: faiss.Index) -> faiss.Index:
    """The empty index whose copies are filled and merged: 4-bit codes one by one instead of in blocks of 32.

    FAISS 1.15 writes outside its memory when it merges blocks (BlockInvertedLists::add_entries, onto a list that holds
    a multiple of 32); when it no longer does, what is trained can be filled itself.
    """
    base, refine = split(trained)
    if not isinstance(base, faiss.IndexIVFPQFastScan):
        return trained
    loose = faiss.IndexIVFPQ(base.quantizer, base.d, base.nlist, base.pq.M, base.pq.nbits, base.metric_type)
    loose.pq, loose.by_residual, loose.is_trained, loose.own_fields = base.pq, base.by_residual, True, False
    return _refined(loose, refine, trained)


def _tighten(whole: faiss.Index, trained: faiss.Index) -> faiss.Index:
    """The merged parts as the kind of index that was trained."""
    block = split(trained)[0]
    if not isinstance(block, faiss.IndexIVFPQFastScan):
        return whole
    base, refine = split(whole)
    return _refined(faiss.IndexIVFPQFastScan(base, block.bbs), refine, whole)


def _refined(base: faiss.Index, refine: faiss.Index | None, owner: faiss.Index) -> faiss.Index:
    """A new base, re-ranked as before; owner holds what both refer to, and is kept alive with them."""
    made = base if refine is None else faiss.IndexRefine(base, refine)
    made.referenced_objects = [base, refine, owner]  # as FAISS's Python does for its own constructors
    return made


def merge(parts: Iterable[faiss.Index], trained: faiss.Index) -> faiss.Index:
    """One index of all parts, which are emptied; in memory: the whole and one part."""
    whole: faiss.Index | None = None
    for part in parts:
        if whole is None:
            whole = part
            continue
        base, refine = split(whole)
        other, others_refine = split(part)
        base.merge_from(other, 0)
        if refine is not None:
            refine.merge_from(others_refine, 0)
            whole.ntotal = base.ntotal
    assert whole is not None, "at least one part"
    return _tighten(whole, trained)


def merge_on_disk(trained: faiss.Index, files: Sequence[str], lists_file: str) -> faiss.Index:
    """As merge, from files of parts: the lists go to a file, and memory holds the centroids and one list at a time.

    Returns the index to be written; it refers to lists_file by its name, in the folder of the index.
    """
    opened = [faiss.read_index(file, faiss.IO_FLAG_MMAP) for file in files]
    lists = inverted_lists(trained)
    assert lists is not None, "only what can_lie_on_disk"
    sources = faiss.InvertedListsPtrVector()
    for part in opened:
        sources.push_back(inverted_lists(part).invlists)  # type: ignore[union-attr]
    if os.path.exists(lists_file):
        os.remove(lists_file)
    target = faiss.OnDiskInvertedLists(lists.nlist, lists.code_size, lists_file)
    trained.ntotal = lists.ntotal = target.merge_from_multiple(sources.data(), sources.size(), False)
    target.filename = os.path.basename(lists_file)  # what the index remembers: no folder of this machine
    lists.replace_invlists(target, True)
    target.this.disown()
    return trained


def list_sizes(index: faiss.Index) -> np.ndarray | None:
    """Vectors of every list [nlist]; None if there are no lists."""
    lists = inverted_lists(index)
    if lists is None:
        return None
    return np.array([lists.invlists.list_size(number) for number in range(lists.nlist)], np.int64)


@contextmanager
def omp_threads(count: int) -> Iterator[None]:
    """Let FAISS use this many threads: sums, and with them the bytes of an index, depend on it."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
