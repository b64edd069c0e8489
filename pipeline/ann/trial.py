"""A tiny index of a factory that the settings name: whether FAISS can do with its kind all that is done with an index.

FAISS makes many kinds that it cannot add to shard by shard, write, or search through a filter, and says so only when it
comes to that: an hour into a build, or in front of a reader. A second here says it before any work.
"""

from __future__ import annotations

import re

import faiss
import numpy as np

from pipeline.ann import parts
from pipeline.ann.asking import Filter, ask
from pipeline.ann.choice import make, reason
from pipeline.ann.devices import Floats
from pipeline.ann.searching import compared, k_factors, widths
from pipeline.ann.training import fit
from pipeline.contracts.errors import SettingsError

TRAINED, ADDED = 10_240, 1_000
"""Vectors to train on, or as many as a code has values, and vectors in the index."""
LISTS, LISTS_BY_CODES = 4, 256
"""At most so many lists; and where centroids have codes of their own, which are trained on them."""


def attempt(factory: str, width: int) -> None:
    """Raise SettingsError if FAISS cannot train, fill, merge, search or filter an index of that factory and width."""
    small = _small(factory)
    count = max([TRAINED, *(2 ** int(bits) for bits in re.findall(r"x(\d+)", small))])
    vectors = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    faiss.normalize_L2(vectors)
    doing = "train"
    try:
        index = make(small, width)
        if not index.is_trained:
            _hurry(index)
            fit(index, vectors, seed=0)
        doing = "fill shard by shard"
        index = _filled(index, vectors[:ADDED])
        doing = "search"
        name, values = widths(index)
        search = {name: values[0]} | ({"k_factor": 1} if k_factors(index) else {})
        compared(index, vectors[:2], search, parts.list_sizes(index))
        report, own = {"search": search, "k": 10, "target": 0.95}, np.full(2, -1)
        odd = np.arange(1, ADDED, 2)
        ask(index, report, vectors[:2], own, 10, Filter.of(index, ADDED, None, odd[:0]))
        doing = "filter"
        found, _ = ask(index, report, vectors[:2], own, 10, Filter.of(index, ADDED, None, odd))
        if np.isin(found, odd).any():
            raise RuntimeError("it finds what it was told not to")
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
        raise SettingsError(
            f"task.index.factory {factory}: FAISS cannot {doing} this kind of index ({reason(error)}); name another, "
            "such as IVF1024,SQ8 or HNSW32, or use auto"
        ) from None


def _small(factory: str) -> str:
    """The same kind with few lists."""
    small = re.sub(r"IVF(\d+)(?=\()", lambda found: f"IVF{min(int(found[1]), LISTS_BY_CODES)}", factory)
    return re.sub(r"IVF(\d+)(?![\d(])", lambda found: f"IVF{min(int(found[1]), LISTS)}", small)


def _hurry(index: faiss.Index) -> None:
    """Train in one round: what it finds is of no interest. Of a product quantizer FAISS takes half a minute else."""
    base, _ = parts.split(index)
    if isinstance(base, faiss.IndexPreTransform):
        for place in range(base.chain.size()):
            transform = faiss.downcast_VectorTransform(base.chain.at(place))
            if isinstance(transform, faiss.OPQMatrix):
                transform.niter = transform.niter_pq = transform.niter_pq_0 = 1
    codes = parts.inverted_lists(index) or base
    if hasattr(codes, "pq"):
        codes.pq.cp.niter = 1
    if hasattr(codes, "do_polysemous_training"):
        codes.do_polysemous_training = False


def _filled(trained: faiss.Index, vectors: Floats) -> faiss.Index:
    """With the vectors, added in two as a build does it: to parts that are merged or, where that cannot be, to one."""
    data, middle = faiss.serialize_index(trained), len(vectors) // 2
    if not parts.can_be_merged(trained):
        trained.add(vectors[:middle])
        trained.add(vectors[middle:])
        return faiss.deserialize_index(faiss.serialize_index(trained))
    made = []
    for first in (0, middle):
        part = parts.loosen(faiss.deserialize_index(data))
        parts.fill(part, vectors[first : first + middle], first, None)
        made.append(faiss.deserialize_index(faiss.serialize_index(part)))
    return parts.merge(made, faiss.deserialize_index(data))
