"""`pinsage embed`, and what serves it: embeddings of items that are not in the catalogue yet, in milliseconds.

    from jobs.embed import Embedder
    embedder = Embedder.open("pinsage.yaml")                       # once; threads may share it
    keys, vectors = embedder.embed([{"sku": "new-1", "title": "red mug"}], {"new-1": ["user-17", "user-4"]})

Vectors lie in the space of the run's embeddings and may be looked up in its index. No Spark, and no GPU. Of a release:

    with jobs.releases.opened(load_settings("pinsage.yaml"), "live") as (settings, release):
        keys, vectors = Embedder(settings).embed(items)            # in the space release.space_id
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console

from jobs.inference import load_network
from pipeline import sources
from pipeline.contracts import schemas
from pipeline.contracts.config import ItemsSource, Settings, load_settings
from pipeline.contracts.datasets import open_manifest, vectors_to_arrow
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.storage import Storage
from pipeline.input_files import Piece, check_columns, find_files, read_piece
from pipeline.newcomers import Newcomers, content_of

if TYPE_CHECKING:
    from pipeline.ann.reader import Index  # faiss takes a while, and vectors need none

_WHOLE_FILE = 1 << 62


class Embedder:
    """A run's model, encoders and graph, opened once."""

    def __init__(self, settings: Settings) -> None:
        storage = Storage(settings.resources.run)
        resources = settings.resources
        inference = resources.inference.model_copy(update={"device": "cpu"})  # whatever embeds the catalogue
        settings = settings.model_copy(update={"resources": resources.model_copy(update={"inference": inference})})
        self._settings, self._source = settings, settings.task.data.items
        network = load_network(storage, open_manifest(storage, schemas.MODEL), settings)
        self._newcomers = Newcomers(storage, settings, network)

    @classmethod
    def open(cls, settings: str | Settings) -> Embedder:
        """By a settings file, any fsspec URL. Raises DataError if the run has no embeddings yet."""
        return cls(settings if isinstance(settings, Settings) else load_settings(settings))

    def embed(
        self, items: Sequence[Mapping[str, Any]] | pa.Table, users: Mapping[str, Iterable[str]] | None = None
    ) -> tuple[list[str], NDArray[np.float32]]:
        """Keys, and embeddings [n, d], of items as the user's own item files have them, one record or row each.

        A field that a record lacks counts as missing. users: for every item's key the keys of the users who touched it;
        of those, users that the graph does not know say nothing. Raises DataError naming the first item that cannot be
        read, and why.
        """
        return self._embed(self._clean(items, "items"), users)

    def embed_file(
        self, items: str, users: Mapping[str, Iterable[str]] | None = None
    ) -> tuple[list[str], NDArray[np.float32]]:
        """As embed, for a file that is like those of task.data.items."""
        source = self._with_content()
        tasks = sources.plan_items(source.model_copy(update={"paths": (items,)}), _WHOLE_FILE)
        columns = sources.item_columns(source)
        pieces = [self._cleaned(read_piece(task, columns), task["url"], task["format"]) for task in tasks]
        return self._embed(pa.concat_tables(pieces), users)

    def users_of(self, interactions: str) -> dict[str, list[str]]:
        """Who touched which item, of a file like those of task.data.interactions; only user and item are read."""
        source = self._settings.task.data.interactions
        found: dict[str, list[str]] = defaultdict(list)
        names = [source.user, source.item]
        files = find_files([interactions], source.format, "interactions")
        for file in files:
            check_columns(
                file, {source.user: f"{sources.INTERACTIONS}.user", source.item: f"{sources.INTERACTIONS}.item"}
            )
        for task in sources.plan_files(files):
            table = read_piece(task, names).table
            keys = [sources.as_keys(table[name], f"{task['url']}: column {name}", task["format"]) for name in names]
            for user, item in zip(*(column.to_pylist() for column in keys), strict=True):
                if user is not None and item is not None:
                    found[item].append(user)
        return found

    def _with_content(self) -> ItemsSource:
        if self._source is None:
            raise SettingsError(
                "task.data.items names no content, so that a new item is like any other: nothing to embed"
            )
        return self._source

    def _clean(self, items: Sequence[Mapping[str, Any]] | pa.Table, name: str) -> pa.Table:
        source = self._with_content()
        columns = sources.item_columns(source)
        if isinstance(items, pa.Table):
            if source.key not in items.column_names:
                raise DataError(f"{name}: there is no column {source.key}, the key of {sources.ITEMS}")
            nothing = pa.nulls(items.num_rows)
            table = pa.table({c: items[c] if c in items.column_names else nothing for c in columns})
            return self._cleaned(Piece(table, np.arange(items.num_rows)), name)
        lacking = next((place for place, record in enumerate(items) if source.key not in record), None)
        if lacking is not None:
            raise DataError(f"{name}: record {lacking} has no field {source.key}, the key of {sources.ITEMS}")
        try:
            table = pa.table({column: pa.array([record.get(column) for record in items]) for column in columns})
        except pa.ArrowException as error:
            raise DataError(f"{name}: a field holds values of several types: {error}") from None
        return self._cleaned(Piece(table, np.arange(len(items))), name)

    def _cleaned(self, piece: Piece, where: str, file_format: str = "") -> pa.Table:
        task = {"url": where, "format": file_format, "widths": self._newcomers.vector_widths}
        good, bad = sources.clean_items(piece, task, self._with_content())
        if bad.num_rows:
            first = bad.slice(0, 1).to_pylist()[0]
            raise DataError(
                f"{where}: row {first['row']}: {first['reason']}; {bad.num_rows} of {piece.table.num_rows} rows cannot "
                "be read, correct them or leave them out"
            )
        return good

    def _embed(
        self, cleaned: pa.Table, users: Mapping[str, Iterable[str]] | None
    ) -> tuple[list[str], NDArray[np.float32]]:
        keys = cleaned.column("item_key").to_pylist()
        touched = None
        if users:
            named = [list(users.get(key, ())) for key in keys]
            ids = self._newcomers.user_ids([str(user) for own in named for user in own])
            ends = np.cumsum([len(own) for own in named])
            touched = [own[own >= 0] for own in np.split(ids, ends[:-1])] if len(keys) else None
        return keys, self._newcomers.embed(content_of(cleaned), touched)


def embed_files(
    settings: Settings, items: str, interactions: str | None, output: Path | None, index: Index | None, k: int
) -> None:
    """What `pinsage embed` does: to a Parquet file or, without output, as JSON lines to stdout.

    With an index also the keys of the k items in it that are nearest.
    """
    embedder = Embedder.open(settings)
    keys, vectors = embedder.embed_file(items, embedder.users_of(interactions) if interactions else None)
    columns: dict[str, Any] = {"key": keys}
    if index is not None:
        columns["nearest"] = index.search(vectors, k)[0]
    if output is None:
        for place in range(len(keys)):
            line = {name: values[place] for name, values in columns.items()}
            sys.stdout.write(json.dumps({**line, "embedding": [float(f"{x:.7g}") for x in vectors[place]]}) + "\n")
        return
    try:
        pq.write_table(pa.table({**columns, "embedding": vectors_to_arrow(vectors)}), output)
    except OSError as error:
        raise SettingsError(f"cannot write {output}: {error.strerror}; give --output another place") from None
    told = Console(stderr=True, highlight=False)
    told.print(f"wrote {output}: {len(keys):,} items", soft_wrap=True)
