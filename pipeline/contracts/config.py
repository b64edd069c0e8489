"""Every setting: frozen pydantic models, read from one YAML file, checked once.

`task` says what is computed and enters the fingerprints of the datasets; `resources` says where and how big. A key
that is not known is an error that names the nearest one that is. A setting's description is its reason and unit: the
reference that `pinsage settings` prints is made from them, so there is no second place to keep true.
"""

from __future__ import annotations

import difflib
import os
import posixpath
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError, model_validator

from pipeline.contracts.errors import SettingsError, StorageError
from pipeline.contracts.safety import secrets_in
from pipeline.contracts.storage import open_input, retry

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Format = Literal["auto", "parquet", "csv", "jsonl"]


class Section(BaseModel):
    """A group of settings; frozen, and closed to names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------- task: the data


class InteractionsSource(Section):
    """Where the interactions are and what their columns are called."""

    paths: Paths
    """One path, a glob or a list of them; any fsspec URL. Relative paths start at the settings file. None at all where
    data.append is true and nothing came."""
    format: Format = "auto"
    """`auto` goes by the file's ending: .parquet, .csv[.gz], .jsonl[.gz] or .ndjson."""
    user: str
    """Column with the key of whatever groups items: a person, a basket, a board. String or integer."""
    item: str
    """Column with the item's key. String or integer."""
    timestamp: str
    """Column with the time of the event."""
    timestamp_unit: Literal["seconds", "milliseconds", "microseconds", "iso", "order"] = "seconds"
    """Epoch in this unit, ISO 8601 text or a date column (`iso`), or merely the order of a user's events (`order`)."""
    weight: str | None = None
    """Column with a non-negative strength of the event; none: every event weighs 1."""
    event: str | None = None
    """Column with the kind of event, looked up in event_weights."""
    event_weights: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    """Weight of each kind of event (0 drops it); a kind that is not listed is quarantined."""

    @model_validator(mode="after")
    def _weights_need_events(self) -> InteractionsSource:
        if bool(self.event) != bool(self.event_weights):
            raise ValueError("event and event_weights go together: give both or neither")
        if self.event and self.weight:
            raise ValueError("give either weight or event, not both")
        return self


class FeatureColumn(Section):
    """One column of item content and how to read it."""

    name: str
    """The column in the items file."""
    kind: Literal["vector", "numeric", "categorical", "text"]
    """vector: list of numbers; numeric: one number; categorical: one or several names; text: words to encode."""
    log: bool = False
    """numeric: take log(1 + x) first (prices, counts)."""
    separator: str | None = None
    """categorical: split the value here, `Comedy|Drama` is two names."""

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> FeatureColumn:
        if self.log and self.kind != "numeric":
            raise ValueError(f"log is for numeric columns, {self.name} is {self.kind}")
        if self.separator is not None and self.kind != "categorical":
            raise ValueError(f"separator is for categorical columns, {self.name} is {self.kind}")
        return self


class ItemsSource(Section):
    """Where the catalogue is, which column is its key and which are its content."""

    paths: Annotated[Paths, Field(min_length=1)]
    """One path, a glob or a list of them; any fsspec URL. Relative paths start at the settings file."""
    format: Format = "auto"
    """`auto` goes by the file's ending."""
    key: str
    """Column with the item's key: unique and never null."""
    title: str | None = None
    """Column to show people; content only if it is also listed in columns."""
    columns: tuple[FeatureColumn, ...] = ()
    """The content, in the order of the feature vector."""

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> ItemsSource:
        names = [column.name for column in self.columns]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"column {name} is listed twice")
        return self


class Data(Section):
    """The user's files."""

    interactions: InteractionsSource
    items: ItemsSource | None = None
    """None: the catalogue is whatever the interactions name, and only its degree is known."""
    unknown_items: Literal["drop", "add"] = "drop"
    """Interactions with an item that the catalogue lacks: dropped and counted, or added without content."""
    max_quarantined_share: Share = 0.01
    """Bad rows are set aside with their reason; more than this share of them fails the run."""
    previous: str | None = None
    """Run folder of an earlier night: its ids are kept, new keys are appended."""
    append: bool = False
    """interactions.paths name only what came since `previous`, whose interactions are kept: late ones find their place
    in time, and files that were read once may be gone. false: the paths name all there is."""
    drop_repeats: bool = False
    """Of events of the same user, item and timestamp only the first is kept, as a feed that delivers at least once
    wants it; false: all are, and an item that was bought twice weighs twice."""


class Split(Section):
    """What is learned from and what is only measured on."""

    kind: Literal["temporal", "leave_last_out", "random"] = "temporal"
    """temporal: one moment for everybody; leave_last_out: each user's last events; random: as some papers do."""
    validation: Annotated[float, Field(ge=0.0)] = 0.05
    """temporal, random: share of the events; leave_last_out: events per user."""
    test: Annotated[float, Field(gt=0.0)] = 0.1
    """As validation, and later in time."""

    @model_validator(mode="after")
    def _sizes_fit_the_kind(self) -> Split:
        if self.kind == "leave_last_out":
            if self.validation != int(self.validation) or self.test != int(self.test):
                raise ValueError("leave_last_out counts whole events per user: validation and test are integers")
        elif self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} + test {self.test} leave nothing to train on")
        return self


# -------------------------------------------------------------------------------------------------- task: the stages


class Graph(Section):
    """Training interactions to a bipartite graph in compressed rows."""

    weighted: bool = False
    """Step along an edge in proportion to its events' weights (interactions.weight or event_weights); false: every
    distinct user and item are one edge like any other."""
    half_life_days: Annotated[float, Field(gt=0.0)] | None = None
    """An event's weight halves in this time before the latest training event; the graph is then weighted. None: no.
    Where timestamps are only an order, a step counts as a day."""
    max_user_degree: Count = 5000
    """A user with more distinct items keeps this many: hubs cost much and say little. 0: no limit."""
    max_item_degree: Count = 0
    """An item with more distinct users keeps this many. 0: no limit; walks bound their own cost."""
    keep: Literal["recent", "random"] = "recent"
    """Which edges of a hub stay: those of the latest events, or any, drawn by seed."""
    min_user_degree: PositiveInt = 1
    """A user with fewer distinct items has no edges; 2 drops those who lead nowhere."""
    min_item_degree: PositiveInt = 1
    """An item with fewer distinct users, counted after the users' limits, has no edges, and so no neighbours."""

    @property
    def has_weights(self) -> bool:
        """Whether edges differ in weight."""
        return self.weighted or self.half_life_days is not None


class Features(Section):
    """Item content to one float vector per item."""

    text_encoder: str = "tfidf"
    """`tfidf` (hashed TF-IDF and SVD, built in), or a sentence-transformers model: its name or folder."""
    text_dimensions: PositiveInt = 128
    """Dimensions kept of every tfidf text column."""
    text_buckets: PositiveInt = 2**15
    """Hash buckets of words and word pairs before the SVD; the encoder holds buckets x dimensions floats."""
    categories: PositiveInt = 256
    """Most frequent names kept per categorical column; the others share one slot."""
    fit_rows: PositiveInt = 200_000
    """Encoders are fitted on at most this many items, evenly spread over the catalogue."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision."""
    previous: str | None = None
    """Run folder of an earlier night whose encoders are used as they are, fitted on its items: a model that goes on
    from that night's knows only their columns. None: fitted anew."""


class Walks(Section):
    """Personalised-PageRank neighbourhoods: every item's nearest items on the graph."""

    estimator: Literal["exact", "walks"] = "exact"
    """exact: read the first item-user-item hop itself, longer hops by composing rows; walks: random walks as the paper,
    which find far less of the true neighbourhood in the same time."""
    num_neighbours: PositiveInt = 50
    """T: the heaviest items kept for each item (paper: 50)."""
    restart_probability: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Chance that a walk ends after each hop."""
    entry_budget: PositiveInt = 8192
    """exact: list entries read per item; users with long lists share what short ones leave, and are sampled."""
    compose: Literal["short", "all", "none"] = "short"
    """exact: for which items a second hop is added: those whose first reaches fewer than num_neighbours items, all of
    them (costs twice as much and changes little), or none."""
    compose_rows: PositiveInt = 16
    """exact: the second hop is made of the first hops of this many nearest items."""
    num_walks: PositiveInt = 1000
    """walks: walks from each item (not published)."""
    max_hops: PositiveInt = 3
    """walks: item-user-item hops after which a walk ends in any case."""


class Pairs(Section):
    """Training pairs, and the hard negatives of every query."""

    window: PositiveInt = 1
    """Pair an item with this many of the user's following items (paper: 1)."""
    max_gap_seconds: Count = 0
    """Longest time between the two; 0: no limit."""
    num_hard_negatives: Count = 50
    """Stored per query; the trainer draws from them. 0: none are computed."""
    hard_negative_ranks: tuple[PositiveInt, PositiveInt] | None = None
    """First and last PPR rank to draw hard negatives from (paper: 2000 to 5000 of 2 billion). None: scaled to the
    catalogue: from num_neighbours to a tenth of the items, but at least twice num_neighbours and at most 5000."""
    compose_rows: PositiveInt = 100
    """Ranks beyond an item's own first hop come from the rows of this many nearest items."""
    compose_width: PositiveInt = 100
    """Entries of each of those rows."""
    questions: Count = 5000
    """About how many validation events the trainer is asked about while it trains, drawn once."""

    @model_validator(mode="after")
    def _ranks_are_in_order(self) -> Pairs:
        if self.hard_negative_ranks and self.hard_negative_ranks[0] >= self.hard_negative_ranks[1]:
            raise ValueError(f"hard_negative_ranks {self.hard_negative_ranks}: the first rank must be below the last")
        return self


class Model(Section):
    """The network. The defaults are the paper's shape at a laptop's size."""

    num_layers: Annotated[int, Field(ge=0, le=4)] = 2
    """K convolutions (paper: 2). 0: content only, the head alone."""
    hidden_dimensions: PositiveInt = 256
    """m: width of a neighbour's message (paper: 2048)."""
    output_dimensions: PositiveInt = 128
    """d: width of every layer's output and of the embedding (paper: 1024)."""
    pooling: Literal["importance", "mean", "max", "attention"] = "importance"
    """How neighbours' messages become one. importance: the sum, weighted by visits (the paper); mean and max: its
    baselines; attention: the weight of a neighbour is multiplied by what it says of itself, learned."""
    fan_outs: tuple[PositiveInt, ...] | None = None
    """Neighbours that each layer reads of those stored, from the features up: [10, 50] reads 10 in the first layer, of
    which there are many, and 50 in the second. None: all in each (the paper)."""
    residual: bool = False
    """Add an item's own vector to what each layer makes of it, before it is scaled to length 1."""
    head_input: Literal["last", "all"] = "last"
    """What the head reads: the last layer's output (the paper), or the outputs of all, side by side."""
    item_dimensions: Count = 0
    """Width of a vector learned for every item, beside its content. 0: none (the paper), so that what is learned holds
    for new items too. For catalogues with little content; an item that is new since training has zeros there, so use
    neighbour_dropout with it."""
    normalise_output: bool = True
    """Scale embeddings to length 1 after the head, so that inner product is cosine. Paper-exact: false."""
    message_passing: Literal["torch", "dgl"] = "torch"
    """Who sums over neighbours; both give the same result, torch is faster and needs no DGL."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Model:
        if self.fan_outs is not None and len(self.fan_outs) != self.num_layers:
            raise ValueError(f"fan_outs names {len(self.fan_outs)} layers, num_layers is {self.num_layers}")
        if self.pooling == "max" and self.message_passing == "dgl":
            raise ValueError("pooling max has no dgl version; set message_passing to torch")
        return self


class CurriculumRow(Section):
    """From this epoch on, these negatives."""

    from_epoch: PositiveInt
    """First epoch, from 1, that this row is for."""
    uniform: Count = 500
    """Negatives drawn uniformly from the catalogue and shared by the whole batch (paper: 500)."""
    popular: Count = 0
    """Negatives drawn by popularity ** popularity_exponent and shared by the whole batch."""
    in_batch: bool = False
    """Whether the positives of the batch's other pairs, of all ranks, are negatives too: as popular as positives are,
    and embedded anyway. Beside uniform ones they are what is called mixed negative sampling."""
    hard: Count = 0
    """Hard negatives of each query by PPR rank (paper: epoch n uses n-1, at most 6)."""
    hardest: Count = 0
    """Of the shared negatives, how many that score highest for a query count again as its hard ones."""
    mined: Count = 0
    """Hard negatives of each query from among the model's own nearest items, see mining."""

    @model_validator(mode="after")
    def _has_negatives(self) -> CurriculumRow:
        if not (self.uniform or self.popular or self.in_batch):
            raise ValueError("a row needs shared negatives: uniform, popular or in_batch")
        return self


PAPER_CURRICULUM = tuple(CurriculumRow(from_epoch=epoch, hard=epoch - 1) for epoch in range(1, 8))


class Mining(Section):
    """Hard negatives by the current model: every item's nearest ones, found anew from time to time."""

    every_steps: PositiveInt = 1000
    """How many steps a finding is used, once a curriculum row asks for mined negatives."""
    ranks: tuple[PositiveInt, PositiveInt] = (20, 200)
    """First and last rank to draw from, counted from 1 by score: the very nearest are likely to be right."""

    @model_validator(mode="after")
    def _ranks_rise(self) -> Mining:
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks {list(self.ranks)} must rise")
        return self


class Validation(Section):
    """How good the network is while it trains: ranks of the targets of task.pairs.questions, never of test events."""

    every_epochs: Count = 1
    """Epochs between two measurements; 0: none are made."""
    full_catalogue: PositiveInt = 200_000
    """Up to so many items, targets are ranked among all; beyond, among a fixed sample, and the history says so."""
    sample: PositiveInt = 20_000
    """Size of that sample; the targets come on top."""
    metric: Literal["mrr", "hit_rate@10", "recall@100"] = "mrr"
    """What decides which state is best."""
    patience: Count = 0
    """Stop after so many measurements without a better one; 0: train all epochs."""
    keep: Literal["last", "best"] = "last"
    """Which state becomes the model: the last, or the best by the metric."""


class Training(Section):
    """Plain PyTorch, one process or DDP under torchrun, the same command."""

    loss: Literal["max_margin", "softmax", "bpr", "cross_entropy"] = "max_margin"
    """max_margin: the paper's; softmax: sampled softmax over the same negatives; bpr: every negative against the
    positive by a logistic loss; cross_entropy: positive and negatives each by a logistic loss of its own (the paper's
    baseline, GraphSAGE's loss)."""
    margin: Annotated[float, Field(ge=0.0)] = 0.1
    """max_margin: how far above a negative a positive must score (not published)."""
    temperature: Annotated[float, Field(gt=0.0)] = 0.1
    """All losses but max_margin: scores are divided by this; small values are only sensible with normalise_output."""
    correct_sampling: bool = True
    """softmax: subtract the logarithm of how often an item is expected among the shared negatives (logQ), so that
    popular items are not pushed away for being drawn more often. Nothing changes where all are uniform."""
    popularity_exponent: Annotated[float, Field(ge=0.0, le=1.0)] = 0.75
    """For negatives drawn by popularity: 1 as often as they are positives, 0 uniformly (word2vec: 0.75)."""
    neighbour_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the items of a batch that are shown as new: without neighbours and with degree 0, so that the network
    learns to embed those that are (DropoutNet, Volkovs et al. 2017)."""
    content_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the items of a batch whose own content is hidden, so that neighbours must speak for them."""
    previous: str | None = None
    """Run folder of an earlier night: training starts from its model (warm start). Needs its encoders too, see
    features.previous. None: from random weights."""
    epochs: Count = 8
    """Passes over the pairs, each in another order; the curriculum and the learning rate count in them. 0: none, the
    previous model is taken as it is, and the stages pairs and train have nothing to do."""
    batch_size: PositiveInt = 2048
    """Pairs per step over all ranks (paper: 2048); shrunk to the number of pairs if there are fewer. The pairs at the
    end of an epoch that do not fill a batch are left out of it."""
    consecutive_pairs: PositiveInt = 1
    """So many pairs that are stored one after the other, mostly of one user, are shuffled as one. 1: every pair on its
    own. More: what a user touches lies close together in the graph, so a batch meets fewer different items: half as
    many with 16 in a catalogue of two million. On the demo's validation events that cost 0.003 of 0.265 MRR."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """Paper-exact: sgd."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak rate, reached by linear warm-up (not published)."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    """Length of the linear warm-up (paper: epoch 1)."""
    decay_per_epoch: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Factor on the rate per epoch after the warm-up, applied step by step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products. bfloat16 is faster on processors and GPUs that have it in hardware; sums over neighbours,
    the loss and the weights stay float32. On CPUs memory was seen to grow from step to step: watch it. Processors
    without it are told of in the log: there a step took five times as long."""
    curriculum: tuple[CurriculumRow, ...] = PAPER_CURRICULUM
    """Which negatives from which epoch; the last row that has begun counts."""
    mining: Mining = Mining()
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _curriculum_is_in_order(self) -> Training:
        if not self.epochs and self.previous is None:
            raise ValueError("epochs is 0, which needs a model to take: name an earlier run in training.previous")
        epochs = [row.from_epoch for row in self.curriculum]
        if not epochs or epochs[0] != 1 or any(a >= b for a, b in pairwise(epochs)):
            raise ValueError(f"curriculum rows must begin at epoch 1 and rise, found from_epoch {epochs}")
        return self


class Inference(Section):
    """Every item's embedding, layer by layer."""

    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the embeddings."""
    layer_dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of what passes between layers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products. bfloat16 pays on GPUs and processors that have it in hardware, and moves embeddings by
    about a hundredth of their length; sums over neighbours are exact in any case."""


class Compact(Section):
    """Embeddings in fewer bytes, beside the embeddings themselves; nothing is made unless asked for."""

    int8: bool = False
    """A byte a dimension, and a scale for each item."""
    dimensions: tuple[PositiveInt, ...] = ()
    """Fewer dimensions, float16: of each number the so many that keep most of the inner products, such as [64, 128]."""


class Index(Section):
    """Embeddings to a FAISS index."""

    factory: str = "auto"
    """A FAISS factory string, such as `IVF4096,SQ8`, or `auto`: chosen by number, width, memory and recall target."""
    memory: ByteSize | None = None
    """What whoever searches may spend on the index, such as 16g; an index that would be larger is an error before
    anything is built. None: no limit."""
    recall_target: Share = 0.95
    """nprobe, and how many are re-ranked, are raised until recall@k against exact search reaches this."""
    k: PositiveInt = 10
    """Neighbours per query in the recall measurement."""
    num_queries: PositiveInt = 1000
    """Held-out queries for tuning, and as many others for the reported recall."""
    train_rows: PositiveInt = 4_000_000
    """The quantizer is trained on at most this many vectors, which the driver holds; 50 for each list are enough."""
    reuse: bool = True
    """Where task.data.previous names an earlier night's run: keep its trained quantizer while the lists it makes of
    today's vectors are as even and as near as they were, and recall reaches its target; else train anew."""


class Evaluation(Section):
    """How good the embeddings are on events that nothing has seen."""

    k: tuple[PositiveInt, ...] = (10, 50)
    """The K of hit-rate@K, Recall@K and NDCG@K."""
    max_events: PositiveInt = 20_000
    """At most this many test events (and users) are ranked, drawn at random; the table says of how many."""
    half_life_days: Annotated[float, Field(gt=0.0)] = 30.0
    """user-to-item: an item's weight in the user's query halves in this time."""
    cold_degree: Count = 0
    """Slice `cold`: items with at most this many training interactions."""
    tail_share: Share = 0.8
    """Slice `tail`: the least popular items, this share of the catalogue."""
    bootstrap: PositiveInt = 1000
    """Resamples (by user) behind every 95 % confidence interval."""
    examples: Count = 5
    """Items whose nearest neighbours are shown by name."""


QuietDays = Annotated[str, Field(pattern=r"^(\d{4}-)?\d\d-\d\d(\.\.(\d{4}-)?\d\d-\d\d)?$")]


class Gate(Section):
    """What lets tonight's run take the live release's place; every bound is one check's."""

    tolerated_loss: Share = 0.05
    """Of the live release's MRR and hit-rate@10 on tonight's test events: a larger loss that is significant (95 %,
    paired by user) blocks. Training again from scratch moves them by 1 to 3 %."""
    tolerated_cold_loss: Share = 0.3
    """As tolerated_loss, for items without training interactions, of queries that are as cold as they were: fewer
    events, and less depends on them."""
    min_questions: PositiveInt = 100
    """With fewer questions that both runs can answer, a comparison says nothing and is skipped."""
    over_popularity: Annotated[float, Field(ge=0.0)] = 1.0
    """PinSage's MRR, item to item, is at least this many times that of popularity. 0: not asked."""
    over_content: Annotated[float, Field(ge=0.0)] = 1.0
    """As over_popularity, of the content alone, which random weights nearly reach. 0: not asked."""
    recall_slack: Share = 0.02
    """How far the index's recall may stay below task.index.recall_target."""
    min_coverage: Share = 0.999
    """Share of the catalogue that has an embedding other than zeros."""
    min_spread: Share = 0.02
    """Variance of the embeddings, as a share of their mean squared length: near 0 all items are alike."""
    min_spread_kept: Share = 0.5
    """Share of the live release's spread that is left."""
    norm_factor: Annotated[float, Field(gt=1.0)] = 2.0
    """Mean length of the embeddings: at most this many times that of the live release, and at least one over it."""
    max_blank_rise: Share = 0.05
    """By how much the share of items with missing or all-zero content may rise above the live release's."""
    max_constant_rise: Share = 0.1
    """By how much the share of content columns that are equal for all items may rise."""
    churn: Share = 0.5
    """Share of the ten nearest items of an item that others may replace, while the model stays the same."""
    churn_new_model: Share = 0.7
    """As churn, for a newly trained model: two trainings share about half, one and random weights a quarter."""
    drift: Share = 0.2
    """1 - mean cosine of items with themselves in the live release, after the best rotation; the same model."""
    drift_new_model: Share = 0.5
    """As drift, for a newly trained model: 0.26 between two weeks of the demo, 0.58 to random weights."""
    sample: PositiveInt = 1000
    """Items whose neighbours are compared by exact search: one pass over both catalogues."""
    align: bool = False
    """Also store the rotation that turns tonight's vectors into the live release's space, for readers who compare
    vectors of different nights."""
    max_degree_shift: Annotated[float, Field(gt=0.0)] = 0.5
    """Octaves by which the items' degrees may move on average: 1 where every second event is gone, 0.02 in a week of a
    shop of 17 months."""
    nights: PositiveInt = 8
    """Tonight's data is compared with the same weekdays of so many weeks, and with the summaries of so many nights."""
    min_volume: Share = 0.5
    """Share of the usual number of events: half of the data missing blocks. A quiet week of a small shop has 0.6."""
    min_basket: Share = 0.65
    """Share of the usual events of a user and day: it varies less than the volume, so it betrays lost rows sooner.
    Where it was lower on a night that tells what is usual, that is the bound, but never less than a half."""
    max_lost: Share = 0.05
    """Share of the events that the live release knew, of the time that both cover, which may be gone."""
    max_repeats: Share = 0.05
    """Share of tonight's new events that repeat another's user, item and moment, above what is usual."""
    max_age_days: Annotated[float, Field(gt=0.0)] = 5.0
    """Age of the newest event at the end of the night's day (UTC): long weekends pass, a dead feed does not."""
    future_hours: Annotated[float, Field(ge=0.0)] = 14.0
    """How far after the end of the night's day (UTC) an event may be dated: the farthest time zone is 14 h ahead."""
    quiet_days: tuple[QuietDays, ...] = ()
    """Days of which no usual volume is expected, such as [12-20..01-06, 2011-04-29], nor counted as age."""
    max_quarantined: Share = 0.01
    """Share of the newly read interactions that were set aside as bad."""
    min_catalogue: Share = 0.9
    """Share of the live release's catalogue that tonight's input must have."""


class Nightly(Section):
    """What `pinsage nightly` makes anew, and when; all else it takes from the night before."""

    train_every: PositiveInt = 7
    """Nights from one training to the next. In the nights between, the last model embeds what is new, and embeddings
    stay in one space."""
    scratch_every: PositiveInt = 28
    """Nights from one training from random weights to the next; trainings between start from the model before them."""
    warm_epochs: PositiveInt = 1
    """Epochs of a training that starts from the model before it."""
    append: bool = True
    """Only files that are new since the live release are read, and added to its interactions; others may be gone. Where
    one was changed since, and with split.kind random, all are read anew: then none may be gone."""


class Task(Section):
    """What is computed."""

    name: str = "pinsage"
    """Shown in reports and Spark's pages."""
    seed: Count = 0
    """Every random number comes from this, the stage and the shard."""
    data: Data
    split: Split = Split()
    graph: Graph = Graph()
    features: Features = Features()
    walks: Walks = Walks()
    pairs: Pairs = Pairs()
    model: Model = Model()
    training: Training = Training()
    inference: Inference = Inference()
    compact: Compact = Compact()
    index: Index = Index()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()
    nightly: Nightly = Nightly()

    @model_validator(mode="after")
    def _a_moment_needs_a_clock(self) -> Task:
        if self.split.kind == "temporal" and self.data.interactions.timestamp_unit == "order":
            raise ValueError(
                "split.kind temporal cuts at one moment for everybody, and data.interactions.timestamp_unit order has "
                "no common clock; set task.split: {kind: leave_last_out, validation: 1, test: 1}"
            )
        if self.data.append and self.data.previous is None:
            raise ValueError("data.append adds to an earlier run's interactions: name it in data.previous")
        if not self.data.append and not self.data.interactions.paths:
            raise ValueError("task.data.interactions.paths is empty: only with data.append may nothing be new")
        if self.data.append and self.split.kind == "random":
            raise ValueError(
                "data.append would draw the split of an earlier run's interactions anew; set split.kind to temporal or "
                "leave_last_out, or data.append: false with all files in data.interactions.paths"
            )
        return self


# -------------------------------------------------------------------------------------------------- resources


class WalksResources(Section):
    """How the graph reaches the tasks that walk on it."""

    strategy: Literal["auto", "replicate", "shuffle"] = "auto"
    """replicate: every host maps one copy of the graph; shuffle: tasks get only the lists that their items need; auto:
    replicate if the graph fits host_memory and the cache's disk."""
    host_memory: ByteSize | None = None
    """What one host may give to the graph, such as 200g. None: half the memory of the machine that decides."""
    cluster_rounds: Count = 5
    """shuffle: rounds of label propagation that lay items out, so that items of one task share users. 0: by id."""


class InferenceResources(Section):
    """How neighbours' messages reach the tasks that sum them."""

    reducer: Literal["auto", "gather", "shuffle"] = "auto"
    """gather: every host maps a whole layer; shuffle: tasks send each other partial sums; auto: gather if a layer fits
    host_memory."""
    host_memory: ByteSize | None = None
    """What one host may give to a layer, such as 200g. None: half the memory of the machine that decides."""
    cluster_rounds: Count = 5
    """shuffle: rounds of label propagation that lay items out, so that neighbours share a shard. 0: by id."""
    hub_share: Annotated[float, Field(ge=0.0, le=0.2)] = 0.02
    """shuffle: share of the items, those in the most lists, whose messages go to every host instead of into sums."""
    keep_layers: bool = False
    """gather: keep what passes between the layers, and what they are made of, so that a later run with this one as
    task.data.previous and the same model makes again only what has changed. Disk: 5.3 KB an item of 384 features, 50
    neighbours and layers of 512 and 256; such later runs share these files, and add what they made again."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the matrix products are made, and with gather the sums over neighbours, if its memory holds a layer. cuda:
    on the GPU that Spark assigned to the task, see spark.task.resource.gpu.amount in resources.spark.conf, else on the
    host's first. Not the same bytes on both, of the products."""


class SparkResources(Section):
    """Where Spark runs."""

    master: str | None = "local[*]"
    """Spark master; None leaves it to spark-submit. A master given to spark-submit wins."""
    driver_memory: str = "2g"
    """JVM heap of the driver, which in local mode is also the executor's."""
    driver_port: Count = 0
    """Port that executors call back on; 0: any free one."""
    conf: dict[str, str] = {}
    """Further Spark settings, by their own names."""


class TrainingResources(Section):
    """The processes that train."""

    ranks: PositiveInt = 1
    """Processes per host that `pinsage train` starts; under your own torchrun this is not read."""
    threads: PositiveInt = 2
    """CPU threads of each rank. Float sums depend on it, so it enters the model's fingerprint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees one."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead of the device."""
    workers: PositiveInt = 1
    """Threads of each rank that prepare batches; where the device is a GPU, one is too few: 14 fed an H200."""
    device_features: ByteSize | None = None
    """Memory of each GPU, such as 8g, for the features of the items that are most often a neighbour: they are not sent
    again with every batch. None: all are sent."""
    checkpoint_every_steps: PositiveInt = 500
    """A killed run loses at most this many steps, or checkpoint_every_minutes."""
    checkpoint_every_minutes: Annotated[float, Field(gt=0.0)] = 10.0
    """Where steps are slow, the clock decides. Checkpoints are written while training goes on."""
    keep_checkpoints: PositiveInt = 2
    """How many of the last checkpoints are kept until the model is there; the best is kept too."""
    max_restarts: Count = 3
    """How often torchrun starts all ranks again, from the last checkpoint, after one died."""
    tensorboard: bool = False
    """Also write events for TensorBoard, into training/tensorboard of the run."""
    master_port: Count = 0
    """Port where the ranks meet; 0: any free one."""


class IndexResources(Section):
    """Where the index is built."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Trains, and finds the list of every vector; auto: cuda where faiss sees one. Not the same bytes on both."""
    threads: PositiveInt | None = None
    """Threads of the driver while it trains, merges and measures, when no task runs. None: resources.threads."""
    merge_memory: ByteSize = ByteSize(8 * 2**30)
    """An index of more bytes is merged on the driver's disk, in resources.cache, and its lists are a file of their own;
    of the kinds that factory auto chooses from, one that cannot be is left out then."""


class ReleasesResources(Section):
    """How long what readers may see is kept (`pinsage gc`), and how long a reader keeps it from being deleted."""

    keep_count: PositiveInt = 7
    """A release among the newest so many is kept, whatever its age."""
    keep_days: Annotated[float, Field(ge=0.0)] = 14.0
    """A release younger than this is kept, whatever their number; so is a run that never became one."""
    lease_seconds: Annotated[float, Field(gt=0.0)] = 600.0
    """An open release is kept for its reader so long; it says that it is still there every third of this. What a reader
    that was killed held is free so long after its last word."""
    clock_skew_seconds: Annotated[float, Field(ge=0.0)] = 300.0
    """How far the clocks of readers and of `pinsage gc` may differ: a lease counts for so much longer than it says."""


class NightlyResources(Section):
    """How long a night may take."""

    budget_hours: Annotated[float, Field(gt=0.0)] | None = None
    """The night stops after this, as if interrupted, with exit code 4; the same command goes on. None: no limit."""


class Resources(Section):
    """Where it is computed and how big the pieces are."""

    site: str | None = None
    """Folder of nightly runs and releases: any fsspec URL; all below it is ours. Relative paths start at the settings
    file. Nights lie in its runs/, what readers follow in its releases/."""
    run: str
    """Folder of this run: any fsspec URL; all below it is ours. Relative paths start at the settings file. May be left
    out where site is given: it is then runs/manual of that."""
    cache: str | None = None
    """Local folder for memory-mapped copies, shared by the processes of a host, and on the driver for the index while
    it is merged and stored; None: one in the temporary folder."""
    rows_per_shard: PositiveInt = 100_000
    """Items or users of a stored shard: what one task holds in memory. Changing it rebuilds datasets."""
    events_per_shard: PositiveInt = 1_000_000
    """Interactions of a stored shard, as rows_per_shard; their rows are much narrower."""
    threads: PositiveInt = 1
    """CPU threads of one Spark task's numeric work. Enters fingerprints, as float sums depend on it."""
    walks: WalksResources = WalksResources()
    inference: InferenceResources = InferenceResources()
    index: IndexResources = IndexResources()
    spark: SparkResources = SparkResources()
    training: TrainingResources = TrainingResources()
    nightly: NightlyResources = NightlyResources()
    releases: ReleasesResources = ReleasesResources()

    @model_validator(mode="before")
    @classmethod
    def _a_site_has_a_place_for_a_run(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and tree.get("run") is None and isinstance(tree.get("site"), str):
            return {**tree, "run": _manual_run(tree["site"])}
        return tree

    @property
    def reads_live(self) -> bool:
        """Whether readers follow the site's live release: a site is given, and no run of its own."""
        return self.site is not None and self.run == _manual_run(self.site)

    @model_validator(mode="after")
    def _the_cache_is_a_folder(self) -> Resources:
        if self.cache is not None and "://" in self.cache:
            raise ValueError(f"cache {self.cache} is a URL; memory is mapped from a folder of the host: give its path")
        return self


def _manual_run(site: str) -> str:
    return f"{site.rstrip('/')}/runs/manual"


class Settings(Section):
    """One file: what (`task`) and where and how big (`resources`)."""

    task: Task
    resources: Resources


# -------------------------------------------------------------------------------------------------- reading


def load_settings(source: str, overrides: Sequence[str] = ()) -> Settings:
    """Read, override and check a settings file.

    source is a path or any fsspec URL of a YAML file. overrides are `dotted.key=value`, the value read as YAML.
    Relative paths inside the file start at its folder. Its key `base` may name another file of that folder, of which
    it says what differs: mappings are merged key by key, all else is replaced. Raises SettingsError naming every wrong
    key at once.
    """
    tree = _read_tree(source)
    for override in overrides:
        _apply_override(tree, override)
    local = source.removeprefix("file://")
    base = posixpath.dirname(source) if "://" in local else os.path.dirname(os.path.realpath(local))
    return parse_settings(tree, where=source, base=base)


def _read_tree(source: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file as plain values, laid over those of its base."""
    action = f"read the settings file {source}"
    try:
        text = retry(action, lambda: _read(source)).decode()
    except FileNotFoundError:
        raise SettingsError(f"cannot {action}: there is no such file; `pinsage init DATA` makes one") from None
    except StorageError as error:
        raise SettingsError(str(error)) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{source} is not text ({error}); `pinsage init DATA` makes a settings file") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source} is not YAML: {error}; mend that place") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds a {type(tree).__name__}"
        raise SettingsError(f"{source} {found}, expected the keys task and resources; `pinsage init DATA` writes them")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or posixpath.basename(base) != base or base in (posixpath.basename(source), *below):
        raise SettingsError(f"{source}: base is {base!r}, expected the name of another settings file in its folder")
    return _laid_over(_read_tree(source[: len(source) - len(posixpath.basename(source))] + base, (*below, base)), tree)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The values of both, those above where both have one; mappings key by key."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            value = _laid_over(below[key], value)
        merged[key] = value
    return merged


def parse_settings(tree: Mapping[str, Any], where: str = "settings", base: str | None = None) -> Settings:
    """Check a tree of plain values; base is the folder or URL that relative paths start at (None: left as they are).

    A tree that holds a key or a secret is refused: settings are stored with every run and shown in its report.
    """
    if secret := list(secrets_in(tree)):
        raise SettingsError(
            f"{where}: {', '.join(secret)} holds a key or a secret; settings are stored with every run, so take it out "
            "and give credentials by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), a profile or a role"
        )
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(error, where)) from None
    settings = settings if base is None else _resolve_paths(settings, where, base)
    _check_places(settings, where)
    return settings


def dump_settings(settings: Settings) -> str:
    """The resolved settings as YAML: every key, every default."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def select(settings: Settings, paths: Sequence[str]) -> dict[str, Any]:
    """The values at dotted paths, as plain JSON values: what a stage's fingerprint is made of.

    Where the user's files lie is left out: moving a clone or a bucket changes no result.
    """
    tree = settings.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for path in paths:
        value: Any = tree
        for part in path.split("."):
            value = value[part]
        chosen[path] = _without_locations(value)
    return chosen


def _without_locations(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_locations(inner) for key, inner in value.items() if key not in ("paths", "previous")}


def reference(model: type[BaseModel] = Settings, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every setting as (dotted name, type, default, description), in file order: the settings reference."""
    rows: list[tuple[str, str, str, str]] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        inner = _section_in(annotation)
        dotted = f"{prefix}{name}"
        if inner is not None and not _is_collection(annotation):
            rows += reference(inner, f"{dotted}.")
            continue
        default = "required" if field.is_required() else _plain(field.default)
        rows.append((dotted, _type_name(annotation), default, " ".join((field.description or "").split())))
        if inner is not None:
            rows += reference(inner, f"{dotted}[].")
    return rows


def _read(source: str) -> bytes:
    with open_input(source) as file:
        data: bytes = file.read()
    return data


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise SettingsError(f"override {override!r} is not of the form dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"override {override!r}: the value is not YAML: {error}") from None
    *parents, last = dotted.split(".")
    node = tree
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise SettingsError(f"override {override!r}: {part} holds {child!r}, not a group of settings")
        node = child
    node[last] = value


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors():
        location = [part for part in problem["loc"] if not str(part).startswith("function-")]
        dotted = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _names_at(location[:-1])
            nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
            lines.append(f"  {dotted}: unknown setting; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"  {dotted}: missing, and it has no default")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if isinstance(problem["input"], (dict, BaseModel)) else f", found {problem['input']!r}"
            lines.append(f"  {dotted}: {message}{found}")
    count = len(lines)
    head = f"{where}: {count} wrong setting{'s' if count > 1 else ''} (`pinsage settings` lists all of them)"
    return "\n".join([head, *lines])


def _names_at(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = None if field is None else _section_in(field.annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _section_in(argument)
        if inner is not None:
            return inner
    return None


def _is_collection(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
    return {Ellipsis: "...", NoneType: "None"}.get(annotation) or str(annotation.__name__)


def _plain(value: object) -> str:
    """A default as one would write it in the settings file."""
    if isinstance(value, tuple):
        value = [row.model_dump() if isinstance(row, Section) else row for row in value]
    elif isinstance(value, ByteSize):
        value = int(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _resolve_paths(settings: Settings, where: str, base: str) -> Settings:
    scheme, is_remote, folder = base.rpartition("://")

    def absolute(path: str) -> str:
        if "://" in path or os.path.isabs(path):
            return path
        return f"{scheme}{is_remote}{posixpath.normpath(posixpath.join(folder, path))}"

    tree = settings.model_dump()
    task, resources = tree["task"], tree["resources"]
    data = task["data"]
    cache = resources["cache"]
    if cache is not None and is_remote and not os.path.isabs(cache):
        raise SettingsError(
            f"{where}: resources.cache is {cache}, relative to a file that is not on this machine; give the full path "
            "of a folder that every host has, or leave it out"
        )
    for source in (data["interactions"], data["items"]):
        if source is not None:
            source["paths"] = tuple(absolute(path) for path in source["paths"])
    earlier = [(task[part], "previous") for part in ("data", "features", "training")]
    for group, name in (*earlier, (resources, "site"), (resources, "run"), (resources, "cache")):
        if group[name] is not None:
            group[name] = absolute(group[name])
    return Settings.model_validate(tree)


def _check_places(settings: Settings, where: str) -> None:
    """Raise SettingsError if the run would write over what it reads, or read what it writes."""
    data, run = settings.task.data, settings.resources.run
    ours = {"run": run} if settings.resources.site is None else {"run": run, "site": settings.resources.site}
    for name, source in (("interactions", data.interactions), ("items", data.items)):
        for path, (place, folder) in product(() if source is None else source.paths, ours.items()):
            lies_in, holds = _is_within(path, folder), _is_within(folder, path)
            if lies_in or holds:
                raise SettingsError(
                    f"{where}: task.data.{name}.paths has {path}, which {'lies in' if lies_in else 'holds'} "
                    f"resources.{place} {folder}; a {place}'s folder is ours to write and sweep: keep your files and "
                    f"the {place} apart"
                )
    site = settings.resources.site
    if site is not None and (_is_within(site, run) or (_is_within(run, site) and not _is_within(run, f"{site}/runs"))):
        raise SettingsError(
            f"{where}: resources.run is {run} and resources.site is {site}; a run of a site lies in {site}/runs, "
            "beside the site's releases and not over them"
        )
    for part in ("data", "features", "training"):
        earlier = getattr(settings.task, part).previous
        if earlier is not None and _place(earlier) == _place(run):
            raise SettingsError(
                f"{where}: task.{part}.previous and resources.run are both {run}; previous is an earlier run's folder, "
                "and what it holds would be lost while the run is rebuilt: give tonight's run a folder of its own"
            )


def _is_within(path: str, folder: str) -> bool:
    inner, outer = _place(path), _place(folder)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")


def _place(url: str) -> str:
    """One spelling of a path or URL, to compare: without `..`, links, or a slash at the end."""
    scheme, remote, path = url.removeprefix("file://").rpartition("://")
    return f"{scheme}://{posixpath.normpath(path)}" if remote else os.path.realpath(path)
