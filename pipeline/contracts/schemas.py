"""Every dataset: its columns, types, units, key and order; and every stage: what it reads, writes and depends on.

A dataset is a folder of shards and a manifest (see `datasets.py`). Types that depend on the settings, such as the
width of a vector, are marked VECTOR; CONTENT, whose columns are the user's, has none listed. The tables in the README
and `pinsage status` are printed from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import pyarrow as pa

from pipeline.contracts.errors import DataError

SCHEMA_VERSION = 1
"""Raised when a stored column changes meaning; a run of another version is refused, never misread."""


TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT = 0, 1, 2
"""Values of interactions.split."""


class Width(Enum):
    """Column types that settings decide."""

    VECTOR = "fixed_size_list<float32 or float16>"


VECTOR = Width.VECTOR


@dataclass(frozen=True)
class Column:
    """One column: name, type, and what a value means."""

    name: str
    type: pa.DataType | Width
    meaning: str


@dataclass(frozen=True)
class Dataset:
    """One dataset of a run. `dense` means row r is id r, so that arithmetic finds any row.

    `columns` is None for the user's own content columns and for folders of files that are not tables.
    """

    name: str
    order: tuple[str, ...]
    columns: tuple[Column, ...] | None
    meaning: str
    dense: bool = False

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema; only for datasets whose every type is fixed."""
        assert self.columns is not None
        fields = []
        for column in self.columns:
            assert isinstance(column.type, pa.DataType), f"{self.name}.{column.name} depends on the settings"
            fields.append(pa.field(column.name, column.type))
        return pa.schema(fields)

    def check(self, schema: pa.Schema, where: str) -> None:
        """Raise DataError unless schema has these columns, in this order, of these types."""
        if self.columns is None:
            return
        expected, remedy = [column.name for column in self.columns], how_to_build(self.name, "again")
        if schema.names != expected:
            raise DataError(f"{where}: columns are {schema.names}, expected {expected}; {remedy}")
        for column, field in zip(self.columns, schema, strict=True):
            if isinstance(column.type, Width):
                good = pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
            else:
                good = field.type.equals(column.type)
            if not good:
                expected_type = column.type.value if isinstance(column.type, Width) else column.type
                raise DataError(f"{where}: column {column.name} is {field.type}, expected {expected_type}; {remedy}")


def how_to_build(name: str, when: str = "") -> str:
    """The command; `again` for a dataset whose manifest says that it is there, which would be skipped as up to date."""
    folder = name.split("/", 1)[0]
    stage = SCRATCH.get(folder) or next((s.name for s in STAGES if any(folder == d.name for d in s.writes)), "run")
    return f"run `pinsage {stage}{' --force' if when else ''}` to build it{f' {when}' if when else ''}"


_ID = Column("id", pa.uint32(), "our dense id")
_KEY = Column("key", pa.string(), "the caller's key, as text")
_IDS = pa.list_(pa.field("element", pa.uint32(), nullable=False))
_FLOATS = pa.list_(pa.field("element", pa.float32(), nullable=False))

INTERACTIONS = Dataset(
    "interactions",
    ("user_id", "timestamp"),
    (
        Column("user_id", pa.uint32(), "who"),
        Column("item_id", pa.uint32(), "what"),
        Column("timestamp", pa.int64(), "when: seconds since 1970, UTC, or the order of events"),
        Column("weight", pa.float32(), "strength of the event, above 0"),
        Column("split", pa.uint8(), "0 train, 1 validation, 2 test"),
    ),
    "clean events of known users and items; a user's events of equal time stay in the order of the input",
)
_NODE_COLUMNS = (
    _KEY,
    _ID,
    Column("degree", pa.int64(), "distinct partners in the training period"),
    Column("first_seen", pa.int64(), "earliest training timestamp, -1 if there is none"),
)
USERS = Dataset("users", ("id",), _NODE_COLUMNS, "everybody who groups items", dense=True)
ITEMS = Dataset(
    "items",
    ("id",),
    (*_NODE_COLUMNS, Column("title", pa.string(), "what to show people, null if unknown")),
    "the catalogue",
    dense=True,
)
CONTENT = Dataset("content", ("id",), None, "id, then the item columns that the settings name, typed", dense=True)
QUARANTINE = Dataset(
    "quarantine",
    ("source", "row"),
    (
        Column("source", pa.string(), "file"),
        Column("row", pa.int64(), "row in it, from 0"),
        Column("reason", pa.string(), "what is wrong with it"),
        Column("values", pa.string(), "the row as JSON, shortened"),
    ),
    "rows set aside, with the reason",
)
_ADJACENCY = (
    _ID,
    Column("neighbours", _IDS, "ids on the other side: ascending in item_users, shuffled by seed in user_items"),
    Column("shares", _IDS, "weighted graphs: running share of the row's weight in units of 2^-32; else empty lists"),
)
ITEM_USERS = Dataset("item_users", ("id",), _ADJACENCY, "training graph, rows of items", dense=True)
USER_ITEMS = Dataset("user_items", ("id",), _ADJACENCY, "training graph, rows of users", dense=True)
FEATURES = Dataset(
    "features",
    ("id",),
    (_ID, Column("features", VECTOR, "encoded content, missing flags, log degree; never NaN")),
    "one content vector per item",
    dense=True,
)
ENCODERS = Dataset("encoders", (), None, "fitted text, category and number encoders, as arrays and JSON")
NEIGHBOURS = Dataset(
    "neighbours",
    ("id",),
    (
        _ID,
        Column("neighbours", _IDS, "up to T nearest items, by weight descending"),
        Column("weights", _FLOATS, "their personalised PageRank or visit counts, L1-normalised"),
    ),
    "personalised-PageRank neighbourhood of every item",
    dense=True,
)
PAIRS = Dataset(
    "pairs",
    ("shard",),
    (
        Column("query", pa.uint32(), "item touched first"),
        Column("positive", pa.uint32(), "item touched right after by the same user"),
        Column("timestamp", pa.int64(), "when the positive was touched"),
    ),
    "training pairs, in the users' order; the loader shuffles them anew every epoch",
)
QUESTIONS = Dataset(
    "questions",
    ("shard",),
    (
        Column("query", pa.uint32(), "item that a user touched just before a validation event"),
        Column("target", pa.uint32(), "item of that event, which the user had not touched before"),
        Column("seen", _IDS, "all that the user had touched before: no candidates"),
    ),
    "what the trainer is asked while it trains",
)
HARD_NEGATIVES = Dataset(
    "hard_negatives",
    ("id",),
    (_ID, Column("negatives", _IDS, "items drawn from the PPR ranks of the settings; empty if there are none")),
    "near but not nearest items of every query",
    dense=True,
)
MODEL = Dataset("model", (), None, "model.safetensors, model.json (shape, statistics) and history.json")
LAYERS = Dataset(
    "layers",
    ("id",),
    (_ID, Column("vector", VECTOR, "a layer's output")),
    "what passes between layers of inference; one dataset per step",
    dense=True,
)
EMBEDDINGS = Dataset(
    "embeddings",
    ("id",),
    (_KEY, _ID, Column("embedding", VECTOR, "the item's embedding")),
    "one embedding per item of the catalogue",
    dense=True,
)
COMPACT = Dataset(
    "compact",
    ("id",),
    None,
    "embeddings in fewer bytes, as task.compact asks: key, id, int8 and scale (value = int8 * scale), first_n",
    dense=True,
)
ROTATION = Dataset("rotation", (), None, "rotation.npy: the matrix that turns embeddings to those of compact's first_n")
INDEX = Dataset(
    "index",
    (),
    None,
    "index.faiss (lists.ivfdata, if large), trained.faiss (empty, for the next night), keys.arrow (row = FAISS id), "
    "lookup.arrow (hash of a key to its row) and recall.json",
)
EVALUATION = Dataset("evaluation", (), None, "metrics.json and report.html")

GATE = Dataset("gate", (), None, "verdict.json: may this run be released, and why; alignment.npy, if task.gate.align")


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: its job's name, the datasets it reads and writes, the settings it depends on."""

    name: str
    reads: tuple[Dataset, ...]
    writes: tuple[Dataset, ...]
    settings: tuple[str, ...]
    meaning: str


_NUMERIC = ("resources.rows_per_shard", "resources.threads")

INGEST = Stage(
    "ingest",
    (),
    (INTERACTIONS, USERS, ITEMS, CONTENT, QUARANTINE),
    ("task.seed", "task.data", "task.split", "resources.rows_per_shard", "resources.events_per_shard"),
    "read the user's files, set bad rows aside, give ids, split by time",
)
GRAPH = Stage(
    "graph",
    (INTERACTIONS, USERS, ITEMS),
    (ITEM_USERS, USER_ITEMS),
    ("task.seed", "task.graph", "task.data.interactions.timestamp_unit", "resources.rows_per_shard"),
    "training interactions to compressed rows, both directions",
)
FEATURES_STAGE = Stage(
    "features",
    (ITEMS, CONTENT),
    (FEATURES, ENCODERS),
    ("task.seed", "task.data.items", "task.features", *_NUMERIC),
    "encode item content to vectors",
)
WALKS = Stage(
    "walks",
    (ITEM_USERS, USER_ITEMS),
    (NEIGHBOURS,),
    ("task.seed", "task.walks", "resources.rows_per_shard"),
    "personalised PageRank to every item's top neighbours",
)
PAIRS_STAGE = Stage(
    "pairs",
    (INTERACTIONS, ITEMS, ITEM_USERS, USER_ITEMS),
    (PAIRS, QUESTIONS, HARD_NEGATIVES),
    ("task.seed", "task.pairs", "task.walks", "resources.rows_per_shard"),
    "training pairs, hard negatives and validation questions",
)
TRAIN = Stage(
    "train",
    (FEATURES, NEIGHBOURS, PAIRS, QUESTIONS, HARD_NEGATIVES),
    (MODEL,),
    ("task.seed", "task.model", "task.training", "resources.training.threads", "resources.training.device"),
    "fit PinSage",
)
INFERENCE = Stage(
    "inference",
    (ITEMS, FEATURES, NEIGHBOURS, MODEL),
    (EMBEDDINGS,),
    ("task.inference", "resources.inference.device", *_NUMERIC),
    "embed every item, layer by layer",
)
COMPACT_STAGE = Stage(
    "compact",
    (EMBEDDINGS,),
    (COMPACT, ROTATION),
    ("task.seed", "task.compact", "resources.threads"),
    "embeddings in fewer bytes, and what that costs in recall",
)
INDEX_STAGE = Stage(
    "index",
    (EMBEDDINGS,),
    (INDEX,),
    ("task.seed", "task.index", "resources.index", *_NUMERIC),
    "build the nearest-neighbour index and measure its recall",
)
EVALUATION_STAGE = Stage(
    "evaluation",
    (INTERACTIONS, ITEMS, ITEM_USERS, USER_ITEMS, FEATURES, EMBEDDINGS, INDEX, MODEL),
    (EVALUATION,),
    (
        "task.seed",
        "task.name",
        "task.split",
        "task.evaluation",
        "task.data.interactions.timestamp_unit",
        "resources.threads",
    ),
    "rank the full catalogue for unseen events, beside baselines; write the report",
)

STAGES = (
    INGEST,
    GRAPH,
    FEATURES_STAGE,
    WALKS,
    PAIRS_STAGE,
    TRAIN,
    INFERENCE,
    COMPACT_STAGE,
    INDEX_STAGE,
    EVALUATION_STAGE,
)
"""In the order that `pinsage run` runs them."""

DIFFERENCES = "differences"
"""Folder of what features and walks note of their rows: digests, and the rows that an earlier run has otherwise."""
EXCHANGE = "neighbour_edges"
"""Folder of what inference by shuffle works out once per neighbour table, and keeps for later models."""
TRAINING = "training"
"""Folder of what the trainer keeps: its checkpoints while it trains, and its log."""
COMPACT_WORK = "compact-work"
"""Folder of the sample that decides how embeddings are turned."""
INDEX_PARTS = "index-parts"
"""Folder of the sample, the trained quantizer and the parts of an index that is being built."""
INDEX_LOG = "index-log"
"""Folder of what the clock said of the index: no dataset, as equal runs differ in it."""
RESOLVED = "settings.yaml"
"""The resolved settings, kept in the run's folder."""
METRICS = "metrics"
"""Folder of what the clock said of every stage: no dataset, as equal runs differ in it."""
SCRATCH = {name: name for name in (INGEST.name, GRAPH.name, WALKS.name)} | {
    "pairs-ranking": PAIRS_STAGE.name,
    TRAINING: TRAIN.name,
    LAYERS.name: INFERENCE.name,
    EXCHANGE: INFERENCE.name,
    GATE.name: GATE.name,
    COMPACT_WORK: COMPACT_STAGE.name,
    INDEX_PARTS: INDEX_STAGE.name,
    INDEX_LOG: INDEX_STAGE.name,
}
"""Folders of what a stage keeps only while it runs, or of what is no stage's, and the command that makes it."""
