"""Kernel of features: item content to float32 columns, fitted once on a sample and then applied shard by shard.

Every kind of column has its encoder, a frozen record of plain values and arrays, so that the whole is one .npz and one
JSON file without pickle, and the same code embeds tonight's catalogue and an item that comes tomorrow. A row's encoding
depends on that row alone, not on the shard it is in. Memory: the sample without its vectors while fitting, and
text_buckets x text_dimensions floats per text column.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.contracts.config import FeatureColumn, Features
from pipeline.contracts.datasets import arrow_to_lists, one_array, open_manifest, read_file
from pipeline.contracts.errors import DataError, ResourceError
from pipeline.contracts.schemas import ENCODERS
from pipeline.contracts.storage import Storage

Floats = NDArray[np.float32]
ARRAYS, DESCRIPTION = "encoders.npz", "encoders.json"
SVD_ITERATIONS = 5
"""Power iterations: with 5 the SVD keeps 0.99 of the variance that the exact one does, and 7 gain 0.004 more."""
_ROUNDING = 1e-9
"""Of the mean: a deviation that is no more is of sums of equal numbers."""
SMALLEST_SINGULAR_VALUE = 1e-5  # of the largest; below is float32 noise, so the text has fewer dimensions


class Encoder(Protocol):
    """Turns one content column into [N, width]; nulls become what says the least."""

    kind: ClassVar[str]

    @property
    def width(self) -> int:
        """Columns that encode returns."""

    def encode(self, column: pa.Array) -> Floats:
        """[N, width] for a column of N values."""


# ------------------------------------------------------------------------------------------------ one column


@dataclass(frozen=True)
class VectorEncoder:
    """Vectors as they are; a missing one is the mean, float32 [width]."""

    kind: ClassVar[str] = "vector"
    mean: Floats

    @property
    def width(self) -> int:
        """Length of the vectors."""
        return len(self.mean)

    def encode(self, column: pa.Array) -> Floats:
        """The vectors, row by row."""
        result = np.tile(self.mean, (len(column), 1))
        result[_present(column)] = vectors_of(column, self.width)
        return result


@dataclass(frozen=True)
class NumericEncoder:
    """One number, standardised; a missing one is the mean, which is 0 then."""

    kind: ClassVar[str] = "numeric"
    log: bool
    mean: float
    scale: float
    width: ClassVar[int] = 1

    @classmethod
    def fit(cls, column: pa.Array, log: bool) -> NumericEncoder:
        """Mean and standard deviation of what is there, after the logarithm."""
        values = column.drop_null().to_numpy()
        values = np.log1p(values) if log else values
        mean, deviation = (float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0)
        varies = deviation > _ROUNDING * abs(mean)  # that of so many 0.2 is not 0
        return cls(log, mean, deviation if varies else 1.0)

    def encode(self, column: pa.Array) -> Floats:
        """[N, 1]."""
        values = column.to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((np.log1p(values) if self.log else values) - self.mean) / self.scale
        return np.where(_present(column), scaled, 0.0).astype(np.float32)[:, None]


@dataclass(frozen=True)
class CategoricalEncoder:
    """One slot per known name and one for all others; rows have length 1, so many names do not outweigh few."""

    kind: ClassVar[str] = "categorical"
    names: tuple[str, ...]

    @classmethod
    def fit(cls, column: pa.Array, most: int) -> CategoricalEncoder:
        """The most frequent names; of equally frequent ones the first in the alphabet."""
        counts = pc.value_counts(pc.list_flatten(column)).to_pylist()
        ranked = sorted(counts, key=lambda entry: (-entry["counts"], entry["values"]))
        return cls(tuple(entry["values"] for entry in ranked[:most]))

    @property
    def width(self) -> int:
        """Known names and the slot of the others."""
        return len(self.names) + 1

    def encode(self, column: pa.Array) -> Floats:
        """[N, width], zero where missing."""
        known = pc.index_in(pc.list_flatten(column), value_set=pa.array(self.names, pa.string()))
        slots = known.fill_null(len(self.names)).to_numpy()
        result = np.zeros((len(column), self.width), dtype=np.float32)
        result[pc.list_parent_indices(column).to_numpy(), slots] = 1.0
        return _unit_rows(result)


@dataclass(frozen=True)
class TfidfEncoder:
    """Words and word pairs, hashed, weighted by rarity, reduced by SVD; rows have length 1, or 0 without a known word.

    idf is float32 [buckets], components is float32 [buckets, width].
    """

    kind: ClassVar[str] = "text"
    idf: Floats
    components: Floats

    @classmethod
    def fit(cls, column: pa.Array, buckets: int, dimensions: int, seed: int) -> TfidfEncoder:
        """Up to `dimensions` dimensions, fewer if the texts have a smaller rank."""
        counts = _count_words(column.drop_null(), buckets)
        frequency = np.bincount(counts.indices, minlength=buckets)
        idf = (np.log((1 + counts.shape[0]) / (1 + frequency)) + 1).astype(np.float32)
        wanted = min(dimensions, *counts.shape)
        if not counts.nnz:
            return cls(idf, np.zeros((buckets, 0), dtype=np.float32))
        from sklearn.utils.extmath import randomized_svd  # imported here, as it takes seconds

        with threadpool_limits(1):  # sums in another order would give other bytes
            _, values, rows = randomized_svd(_weigh(counts, idf), wanted, n_iter=SVD_ITERATIONS, random_state=seed)
        rank = int((values > SMALLEST_SINGULAR_VALUE * values[0]).sum())
        return cls(idf, np.ascontiguousarray(rows[:rank].T, dtype=np.float32))

    @property
    def width(self) -> int:
        """Dimensions kept."""
        return int(self.components.shape[1])

    def encode(self, column: pa.Array) -> Floats:
        """[N, width], zero where missing."""
        weighted = _weigh(_count_words(column.fill_null(""), len(self.idf)), self.idf)
        return _unit_rows(np.asarray(weighted @ self.components, dtype=np.float32))


@dataclass(frozen=True)
class SentenceEncoder:
    """A sentence-transformers model, by name or folder; rows have length 1, or 0 where the text is missing."""

    kind: ClassVar[str] = "text"
    model: str
    width: int

    @classmethod
    def fit(cls, model: str) -> SentenceEncoder:
        """Nothing is learned; the model is loaded to see that it can be, and for its width."""
        return cls(model, int(_sentence_model(model).encode(["a"]).shape[1]))

    def encode(self, column: pa.Array) -> Floats:
        """[N, width], zero where missing."""
        result = np.zeros((len(column), self.width), dtype=np.float32)
        present = _present(column)
        if present.any():
            texts = column.drop_null().to_pylist()
            result[present] = _sentence_model(self.model).encode(texts, batch_size=256, show_progress_bar=False)
        return _unit_rows(result)


# ------------------------------------------------------------------------------------------------ all columns


@dataclass(frozen=True)
class Block:
    """One content column: its name in the settings, in the table, how it is encoded, and whether absence is flagged."""

    name: str
    column: str
    encoder: Encoder
    flagged: bool


@dataclass(frozen=True)
class Encoders:
    """Every content column in the settings' order, then the logarithm of the degree."""

    blocks: tuple[Block, ...]

    @property
    def layout(self) -> list[dict[str, Any]]:
        """What every column of the feature vector is: name, kind, and [start, stop)."""
        entries, start = [], 0
        for block in self.blocks:
            parts = [(block.encoder.kind, block.encoder.width), ("missing", int(block.flagged))]
            for kind, width in parts:
                if width:
                    entries.append({"name": block.name, "kind": kind, "start": start, "stop": start + width})
                start += width
        return [*entries, {"name": "degree", "kind": "degree", "start": start, "stop": start + 1}]

    def encode(self, table: pa.Table) -> Floats:
        """[N, F] for a table with the content columns and, unless all are new items, their training `degree`.

        Raises DataError naming the column if a value leaves the range of float32.
        """
        parts: list[NDArray[Any]] = []
        for block in self.blocks:
            column = one_array(table.column(block.column))
            encoded = block.encoder.encode(column)
            if not np.isfinite(encoded).all():
                raise DataError(f"item column {block.name}: a value is too large for float32; set log or scale it")
            parts.append(encoded)
            if block.flagged:
                parts.append(~_present(column)[:, None])
        degree = table.column("degree").to_numpy() if "degree" in table.column_names else np.zeros(table.num_rows)
        parts.append(np.log1p(degree)[:, None])
        return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")

    def narrow(self, vectors: Floats, dtype: np.dtype[Any]) -> NDArray[np.floating]:
        """What encode gave, to the stored precision; DataError naming the column that does not fit it."""
        with np.errstate(over="ignore"):
            stored: NDArray[np.floating] = vectors.astype(dtype, copy=False)
        bad = np.flatnonzero(~np.isfinite(stored).all(axis=0))
        if len(bad):
            name = next(entry["name"] for entry in self.layout if entry["stop"] > bad[0])
            raise DataError(f"item column {name}: a value is too large for {dtype}; set task.features.dtype: float32")
        return stored


def fit_encoders(
    tables: Iterable[pa.Table], columns: Sequence[FeatureColumn], settings: Features, seed: int
) -> Encoders:
    """Fit on a sample that comes piece by piece: content columns only, in the settings' order, whatever their names.

    Vectors are summed as they pass and only the other columns are kept. A column with anything missing in the sample
    gets a flag. Raises DataError for a vector column without a vector, ResourceError for a text model that cannot run.
    """
    sums: dict[int, NDArray[np.float64]] = {}
    present = np.zeros(len(columns), dtype=np.int64)
    kept: list[list[pa.Array]] = [[] for _ in columns]
    names: list[str] = []
    num_rows = 0
    for table in tables:
        names = table.column_names
        num_rows += table.num_rows
        for place, feature in enumerate(columns):
            array = one_array(table.column(place))
            present[place] += len(array) - array.null_count
            if feature.kind != "vector":
                kept[place].append(array)
            elif array.null_count < len(array):
                vectors = vectors_of(array, -1)
                sums[place] = sums.get(place, 0) + vectors.sum(axis=0, dtype=np.float64)
    blocks = []
    for place, feature in enumerate(columns):
        if feature.kind == "vector":
            if place not in sums:
                raise DataError(
                    f"item column {feature.name} has no vector in {num_rows:,} items; "
                    "take it out of task.data.items.columns"
                )
            encoder: Encoder = VectorEncoder((sums[place] / present[place]).astype(np.float32))
        else:
            encoder = _fit_column(pa.concat_arrays(kept[place]), feature, settings, seed)
        blocks.append(Block(feature.name, names[place], encoder, bool(present[place] < num_rows)))
    return Encoders(tuple(blocks))


def _fit_column(column: pa.Array, feature: FeatureColumn, settings: Features, seed: int) -> Encoder:
    if feature.kind == "numeric":
        return NumericEncoder.fit(column, feature.log)
    if feature.kind == "categorical":
        return CategoricalEncoder.fit(column, settings.categories)
    if settings.text_encoder == "tfidf":
        return TfidfEncoder.fit(column, settings.text_buckets, settings.text_dimensions, seed)
    return SentenceEncoder.fit(settings.text_encoder)


# ------------------------------------------------------------------------------------------------ storing

_CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (VectorEncoder, NumericEncoder, CategoricalEncoder, TfidfEncoder, SentenceEncoder)
}


def dump_encoders(encoders: Encoders) -> dict[str, bytes]:
    """The two files of the dataset, by name; the same bytes for the same encoders."""
    arrays: dict[str, NDArray[Any]] = {}
    described = []
    for number, block in enumerate(encoders.blocks):
        values = {field.name: getattr(block.encoder, field.name) for field in fields(block.encoder)}  # type: ignore[arg-type]
        arrays |= {f"{number}.{name}": value for name, value in values.items() if isinstance(value, np.ndarray)}
        plain = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
        described.append(
            {
                "name": block.name,
                "column": block.column,
                "flagged": block.flagged,
                "encoder": type(block.encoder).__name__,
                "values": plain,
            }
        )
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # type: ignore[arg-type]
    text = json.dumps({"blocks": described, "layout": encoders.layout}, indent=1, ensure_ascii=False)
    return {ARRAYS: sink.getvalue(), DESCRIPTION: text.encode()}


def load_encoders(storage: Storage) -> Encoders:
    """The fitted encoders of a run; opened once per process and content."""
    manifest = open_manifest(storage, ENCODERS)
    return _load(storage.url, manifest.content)


@lru_cache(maxsize=2)
def _load(url: str, content: str) -> Encoders:
    storage = Storage(url)
    manifest = open_manifest(storage, ENCODERS)
    described = json.loads(read_file(storage, manifest, DESCRIPTION))["blocks"]
    blocks = []
    with np.load(io.BytesIO(read_file(storage, manifest, ARRAYS)), allow_pickle=False) as arrays:
        for number, entry in enumerate(described):
            cls = _CLASSES[entry["encoder"]]
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in entry["values"].items()}
            values |= {f.name: arrays[f"{number}.{f.name}"] for f in fields(cls) if f.name not in values}
            blocks.append(Block(entry["name"], entry["column"], cls(**values), entry["flagged"]))
    return Encoders(tuple(blocks))


# ------------------------------------------------------------------------------------------------ helpers


def vectors_of(column: pa.Array, width: int) -> Floats:
    """The vectors that are there, [number of them, width]."""
    values: Floats = arrow_to_lists(column.drop_null())[1]
    return values.reshape(len(column) - column.null_count, width)


def _present(column: pa.Array) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = pc.is_valid(column).to_numpy(zero_copy_only=False)
    return mask


def _unit_rows(matrix: Floats) -> Floats:
    """Rows scaled to length 1, rows of zeros left as they are."""
    norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    matrix /= np.where(norms > 0, norms, 1.0)[:, None].astype(np.float32)
    return matrix


def _count_words(texts: pa.Array, buckets: int) -> csr_matrix:
    """[N, buckets] counts of words and pairs of neighbouring words, hashed without signs."""
    from sklearn.feature_extraction.text import HashingVectorizer  # imported here, as it takes seconds

    hashing = HashingVectorizer(
        n_features=buckets,
        ngram_range=(1, 2),
        token_pattern=r"(?u)\b\w+\b",
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    return hashing.transform(texts.to_pylist()) if len(texts) else csr_matrix((0, buckets), dtype=np.float32)


def _weigh(counts: csr_matrix, idf: Floats) -> csr_matrix:
    """(1 + log count) times rarity, rows scaled to length 1."""
    weights = (1 + np.log(counts.data)) * idf[counts.indices]
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    norms = np.sqrt(np.bincount(rows, weights=weights.astype(np.float64) ** 2, minlength=counts.shape[0]))
    return csr_matrix(((weights / norms[rows]).astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)


@lru_cache(maxsize=1)
def _sentence_model(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ResourceError(
            f"task.features.text_encoder is {name!r}, which needs sentence-transformers: "
            "pip install 'pinsage-pipeline[text]', or set it to tfidf"
        ) from None
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"task.features.text_encoder: the model {name!r} cannot be loaded: {str(error).splitlines()[0]}; "
            "give the name of a sentence-transformers model or its folder, or tfidf"
        ) from error
