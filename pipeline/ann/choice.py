"""Which index: a factory string from the number of vectors, their width, memory, the recall target and a GPU.

The first row of PROFILES that is meant for so many vectors, fits the memory and can reach the target is taken. They
stand in the order of speed at equal recall; bytes are those of one vector, to which the lists' centroids come. What
`ceiling` says is for clustered unit vectors of 128 dimensions with every list searched: whatever nprobe, an index finds
no more. Those of Flat and IVF hold for all, that of SQ8 was measured; those of SQ6 and SQ4 are estimates. OPQ is not
among them: its training took nine tenths of a build and bought nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import log2

import faiss

from pipeline.contracts.errors import SettingsError

POINTS_PER_CENTROID = 39
"""FAISS's own lower limit, below which k-means centroids are noise."""
TRAIN_POINTS = 50
"""Vectors per list that training takes where it can have them."""
MANY_LISTS = 8192
"""From so many lists on a vector's list is found by codes of the centroids, of which the nearest are compared whole."""
_ID_BYTES, _LINK_BYTES = 8, 4


@dataclass(frozen=True)
class Profile:
    """One kind of index: for how many vectors, its factory string, and the highest recall@10 it can reach.

    in_memory: only where the driver can merge all of it in memory. FAISS cannot keep what is re-ranked in a file, and
    whole vectors in one are slower to search than their codes.
    """

    name: str
    fewest: int
    most: int
    pattern: str
    ceiling: float
    meaning: str
    in_memory: bool = False


PROFILES = (
    Profile("exact", 0, 20_000, "Flat", 1.0, "compares all: under a millisecond per query and core"),
    Profile("plain", 20_001, 200_000, "IVF{lists},Flat", 1.0, "lists of whole vectors"),
    Profile(
        "fast", 200_001, 2**32, "IVF{lists},PQ{half}x4fsr,Refine(SQfp16)", 0.999,
        "4-bit codes compared in registers, the best re-ranked by half-precision vectors", True,
    ),
    Profile("plain", 200_001, 2**32, "IVF{lists},Flat", 1.0, "where memory is plenty and the width is odd", True),
    Profile("compact", 20_001, 2**32, "IVF{lists},SQ8", 0.98, "a byte per dimension"),
    Profile("small", 20_001, 2**32, "IVF{lists},SQ6", 0.94, "six bits per dimension"),
    Profile("smallest", 20_001, 2**32, "IVF{lists},SQ4", 0.8, "four bits per dimension"),
    Profile("plain", 200_001, 2**32, "IVF{lists},Flat", 1.0, "where codes cannot reach the recall"),
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A factory string, why, and how many bytes the index will take."""

    factory: str
    reason: str
    bytes: int


def choose(
    num_vectors: int,
    width: int,
    memory: int | None,
    target: float,
    train_rows: int,
    gpu: bool,
    merge_memory: int | None = None,
) -> Choice:
    """The fastest index that fits; SettingsError, with what would be needed, if none does.

    train_rows bounds nlist; merge_memory is what the driver may give to an index that cannot be merged on disk.
    """
    nlist = count_lists(num_vectors, train_rows, gpu)
    rejected = []
    for profile in PROFILES:
        if not profile.fewest <= num_vectors <= profile.most or ("{half}" in profile.pattern and width % 2):
            continue
        factory = _fill(profile.pattern, nlist, width) if nlist > 1 else "Flat"
        size = estimate_bytes(factory, num_vectors, width)
        ceiling = profile.ceiling if nlist > 1 else 1.0
        if ceiling < target:
            rejected.append(f"{factory} can reach {ceiling:g}")
        elif memory is not None and size > memory:
            rejected.append(f"{factory} takes {size:,} bytes")
        elif merge_memory is not None and profile.in_memory and size > merge_memory:
            rejected.append(f"{factory} takes {size:,} bytes, and resources.index.merge_memory is {merge_memory:,}")
        else:
            reason = f"{profile.name}: {profile.meaning}"
            return Choice(factory, reason + (f"; {', '.join(rejected)}" if rejected else ""), size)
    raise SettingsError(
        f"task.index.memory is {memory or 0:,} bytes, and no index of {num_vectors:,} vectors of {width} dimensions "
        f"that reaches recall {target:g} fits: {', '.join(rejected)}; raise task.index.memory, lower "
        "task.index.recall_target, or name a smaller task.index.factory"
    )


def count_lists(num_vectors: int, train_rows: int, gpu: bool = False) -> int:
    """About 4 sqrt(N) lists, on a GPU, whose training is cheap, 8; a power of 2, so that nights share a quantizer.

    Fewer where centroids would see too few vectors.
    """
    most = min(num_vectors, train_rows) // POINTS_PER_CENTROID
    if most < 2:
        return 1
    wanted = round(log2((8 if gpu else 4) * num_vectors**0.5))
    return int(2 ** min(wanted, int(log2(most))))


def check_given(factory: str, num_vectors: int, width: int, memory: int | None) -> Choice:
    """A factory string of the settings; SettingsError if FAISS does not know it, or its index would not fit memory."""
    size = estimate_bytes(factory, num_vectors, width)
    if memory is not None and size > memory:
        raise SettingsError(
            f"task.index.factory {factory} takes about {size:,} bytes for {num_vectors:,} vectors of {width} "
            f"dimensions, and task.index.memory is {memory:,}; raise it, name a smaller factory, or auto"
        )
    return Choice(factory, "task.index.factory", size)


def estimate_bytes(factory: str, num_vectors: int, width: int) -> int:
    """Bytes of an index of so many vectors, from what FAISS says of an empty one."""
    index = make(factory, width)  # owns what is looked at below
    return _bytes_of(index, num_vectors)


def _bytes_of(index: faiss.Index, count: int) -> int:
    """Of an empty index, or one in it, were so many vectors added."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        return _bytes_of(index.base_index, count) + _bytes_of(index.refine_index, count)
    if isinstance(index, faiss.IndexPreTransform):
        return _bytes_of(index.index, count)
    if isinstance(index, faiss.IndexIVF):
        return count * (int(index.code_size) + _ID_BYTES) + _bytes_of(index.quantizer, int(index.nlist))
    if isinstance(index, faiss.IndexHNSW):
        links = 2 * index.hnsw.nb_neighbors(1) * _LINK_BYTES
        return int(count * links) + _bytes_of(index.storage, count)
    if isinstance(index, (faiss.IndexFlatCodes, faiss.IndexFastScan)):
        return count * int(index.code_size)
    return int(count * (_ID_BYTES + 4 * int(index.d)))


def make(factory: str, width: int) -> faiss.Index:
    """An empty, untrained index of inner products. Raises SettingsError if FAISS does not know the factory string."""
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise SettingsError(
            f"task.index.factory {factory}: FAISS does not build it for {width} dimensions ({reason(error)}); use auto"
        ) from None


def reason(error: Exception) -> str:
    """What a FAISS exception says, without its C++ function and file."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^Error in .* at \S+:\d+: ", "", lines[-1].rpartition("Error: ")[2].strip())


def coarse(width: int) -> str:
    """The kind of index that finds the nearest of many centroids, one or some: all codes, then the nearest whole.

    4-bit codes go by pairs of dimensions; an odd width has none, and gets a graph.
    """
    return f"PQ{width // 2}x4fs,RFlat" if width % 2 == 0 else "HNSW32"


def _fill(pattern: str, nlist: int, width: int) -> str:
    if nlist >= MANY_LISTS:
        found_by = coarse(width)
        pattern = pattern.replace("{lists}", "{lists}_HNSW32" if found_by == "HNSW32" else f"{{lists}}({found_by})")
    return pattern.format(lists=nlist, half=width // 2)
