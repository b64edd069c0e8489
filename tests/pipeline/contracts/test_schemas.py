"""What stages promise each other fits together, and a shard that breaks its promise is named."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, parse_settings, select
from pipeline.contracts.errors import DataError
from pipeline.contracts.schemas import STAGES, Dataset


def test_a_stage_reads_only_what_an_earlier_stage_writes() -> None:
    written: set[str] = set()
    for stage in STAGES:
        for dataset in stage.reads:
            assert dataset.name in written, f"{stage.name} reads {dataset.name} before anything writes it"
        written |= {dataset.name for dataset in stage.writes}


def test_every_dataset_is_written_by_one_stage_and_has_a_folder_of_its_own() -> None:
    names = [dataset.name for stage in STAGES for dataset in stage.writes]
    assert len(names) == len(set(names))
    assert not {schemas.LAYERS.name, "ingest"} & set(names)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_depends_on_settings_that_exist(stage: schemas.Stage) -> None:
    for path in stage.settings:
        model = Settings
        for part in path.split("."):
            assert part in model.model_fields, f"{stage.name} depends on {path}, and there is no {part}"
            annotation = model.model_fields[part].annotation
            arguments = (annotation, *getattr(annotation, "__args__", ()))
            model = next((a for a in arguments if hasattr(a, "model_fields")), model)


def test_no_stage_depends_on_where_it_runs() -> None:
    for stage in STAGES:
        for path in stage.settings:
            assert not path.startswith(("resources.run", "resources.cache", "resources.spark"))


def test_only_what_changes_a_stages_output_makes_it_run_again() -> None:
    """Events are cut into shards by ingest alone; how often training saves its state changes no model."""
    base = {"task": {"data": {"interactions": {"paths": "e", "user": "u", "item": "i", "timestamp": "t"}}}}
    changed = {"events_per_shard": 7, "training": {"checkpoint_every_steps": 3}}
    before, after = (parse_settings({**base, "resources": {"run": "r", **more}}) for more in ({}, changed))
    affected = [stage.name for stage in STAGES if select(before, stage.settings) != select(after, stage.settings)]
    assert affected == ["ingest"]


@pytest.mark.parametrize(
    ("name", "when", "command"),
    [
        ("pairs", "", "run `pinsage pairs` to build it"),
        ("pairs", "again", "run `pinsage pairs --force` to build it again"),
        ("layers/output-1", "again", "run `pinsage inference --force` to build it again"),
        ("neighbour_edges/edges", "again", "run `pinsage inference --force` to build it again"),
        ("ingest/events", "again", "run `pinsage ingest --force` to build it again"),
        ("unheard-of", "", "run `pinsage run` to build it"),
    ],
)
def test_every_dataset_even_of_passage_has_a_command_that_builds_it(name: str, when: str, command: str) -> None:
    assert schemas.how_to_build(name, when) == command


def test_every_column_says_what_it_means() -> None:
    for dataset in (*(dataset for stage in STAGES for dataset in stage.writes), schemas.LAYERS):
        assert dataset.meaning
        for column in dataset.columns or ():
            assert column.meaning, f"{dataset.name}.{column.name}"
            assert column.name != "id" or dataset.order[:1] == ("id",)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_a_vector_may_have_any_width_and_either_precision(kind: pa.DataType) -> None:
    vector = pa.list_(pa.field("element", kind, nullable=False), 3)
    schemas.FEATURES.check(pa.schema([("id", pa.uint32()), ("features", vector)]), "features shard 0")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("key", pa.string()), ("id", pa.int64())], "users shard 4: columns are"),
        ([("id", pa.uint32()), ("key", pa.string())], "users shard 4: columns are"),
        (
            [("key", pa.string()), ("id", pa.int64()), ("degree", pa.int64()), ("first_seen", pa.int64())],
            "users shard 4: column id is int64, expected uint32; run `pinsage ingest --force` to build it again",
        ),
    ],
)
def test_another_schema_is_refused_by_shard_column_and_remedy(
    fields: list[tuple[str, pa.DataType]], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        schemas.USERS.check(pa.schema(fields), "users shard 4")
    assert message in str(caught.value)
    assert "run `pinsage ingest --force`" in str(caught.value)


def test_a_list_where_a_vector_is_promised_is_refused() -> None:
    with pytest.raises(DataError, match=r"column embedding is list<.*>, expected fixed_size_list.*pinsage inference"):
        schemas.EMBEDDINGS.check(
            pa.schema([("key", pa.string()), ("id", pa.uint32()), ("embedding", pa.list_(pa.float32()))]), "shard 0"
        )


def test_a_dataset_of_files_has_no_columns_to_check() -> None:
    Dataset("anything", (), None, "files").check(pa.schema([("a", pa.int8())]), "anything shard 0")
