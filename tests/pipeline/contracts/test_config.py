"""Settings: what is wrong is named, all at once, with the nearest right name; what is right comes back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.contracts.config import (
    Section,
    Settings,
    dump_settings,
    load_settings,
    parse_settings,
    reference,
    select,
)
from pipeline.contracts.errors import SettingsError
from pipeline.contracts.schemas import STAGES

INTERACTIONS = {"paths": "events.parquet", "user": "basket", "item": "product", "timestamp": "when"}


def tree(**task: Any) -> dict[str, Any]:
    """The least that is needed, and sections of the task."""
    return {"task": {"data": {"interactions": INTERACTIONS}, **task}, "resources": {"run": "runs/a"}}


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def message(content: dict[str, Any], **options: Any) -> str:
    """What a person reads about these settings."""
    with pytest.raises(SettingsError) as caught:
        parse_settings(content, **options)
    return str(caught.value)


def test_data_and_a_run_folder_are_all_that_must_be_given() -> None:
    settings = parse_settings(tree())
    assert settings.task.walks.num_neighbours == 50
    assert settings.resources.run == "runs/a"


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    assert "task.walks.num_neighbors: unknown setting; did you mean num_neighbours?" in message(
        tree(walks={"num_neighbors": 5})
    )


def test_an_unknown_name_unlike_any_is_refused_with_all_known_ones() -> None:
    text = message(tree(inference={"zzzzzz": 1}))
    assert "task.inference.zzzzzz: unknown setting; known here: dtype, layer_dtype" in text


def test_an_unknown_name_inside_a_list_is_placed() -> None:
    items = {"paths": "i", "key": "k", "columns": [{"name": "a", "kind": "text"}, {"name": "b", "knd": "text"}]}
    text = message(tree(data={"interactions": INTERACTIONS, "items": items}))
    assert "task.data.items.columns.1.knd: unknown setting; did you mean kind?" in text
    assert "task.data.items.columns.1.kind: missing, and it has no default" in text


def test_everything_wrong_is_said_at_once_and_where() -> None:
    content = tree(walks={"num_walks": 0, "restart_probability": 1.0}, sead=1)
    del content["resources"]["run"]
    text = message(content, where="shop.yaml")
    assert text.startswith("shop.yaml: 4 wrong settings (`pinsage settings` lists all of them)\n")
    assert "task.walks.num_walks: Input should be greater than 0, found 0" in text
    assert "task.walks.restart_probability: Input should be less than 1, found 1.0" in text
    assert "task.sead: unknown setting; did you mean seed?" in text
    assert "resources.run: missing" in text


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"split": {"validation": 0.5, "test": 0.5}}, "validation 0.5 + test 0.5 leave nothing to train on"),
        ({"split": {"kind": "leave_last_out", "test": 0.5}}, "validation and test are integers"),
        ({"pairs": {"hard_negative_ranks": [9, 9]}}, "the first rank must be below the last"),
        ({"training": {"curriculum": [{"from_epoch": 2}]}}, r"must begin at epoch 1 and rise, found from_epoch [2]"),
        ({"training": {"curriculum": []}}, r"found from_epoch []"),
        ({"data": {"interactions": {**INTERACTIONS, "event": "kind"}}}, "event and event_weights go together"),
        (
            {"data": {"interactions": {**INTERACTIONS, "weight": "w", "event": "kind", "event_weights": {"buy": 1}}}},
            "give either weight or event, not both",
        ),
        ({"data": {"interactions": {**INTERACTIONS, "paths": []}}}, "task.data.interactions.paths"),
        ({"data": {"interactions": {**INTERACTIONS, "timestamp_unit": "order"}}}, "set task.split: {kind: leave_last_"),
    ],
)
def test_values_that_contradict_each_other_are_refused(task: dict[str, Any], expected: str) -> None:
    assert expected in message(tree(**task))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([{"name": "a", "kind": "text"}, {"name": "a", "kind": "vector"}], "column a is listed twice"),
        ([{"name": "a", "kind": "text", "log": True}], "log is for numeric columns, a is text"),
        ([{"name": "a", "kind": "text", "separator": "|"}], "separator is for categorical columns, a is text"),
        ([{"name": "a", "kind": "texts"}], "found 'texts'"),
    ],
)
def test_content_columns_that_cannot_be_meant_are_refused(columns: list[dict[str, Any]], expected: str) -> None:
    items = {"paths": "items.csv", "key": "k", "columns": columns}
    assert expected in message(tree(data={"interactions": INTERACTIONS, "items": items}))


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValidationError):
        parse_settings(tree()).task.walks.num_walks = 3


# ------------------------------------------------------------------------------------------------ files


def test_relative_paths_start_at_the_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tree()
    content["resources"]["cache"] = "/absolute/cache"
    content["task"]["data"]["previous"] = "s3://bucket/earlier"
    write(tmp_path, content)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = load_settings("../settings.yaml")
    assert settings.task.data.interactions.paths == (str(tmp_path / "events.parquet"),)
    assert settings.resources.run == str(tmp_path / "runs/a")
    assert settings.resources.cache == "/absolute/cache"
    assert settings.task.data.previous == "s3://bucket/earlier"


def test_relative_paths_start_at_a_settings_file_anywhere() -> None:
    content = tree()
    content["task"]["data"]["previous"] = "../earlier"
    content["resources"]["cache"] = "/scratch"
    with fsspec.open("memory://bucket/settings/shop.yaml", "w") as file:
        file.write(yaml.safe_dump(content))
    settings = load_settings("memory://bucket/settings/shop.yaml")
    assert settings.task.data.interactions.paths == ("memory://bucket/settings/events.parquet",)
    assert settings.task.data.previous == "memory://bucket/earlier"
    assert (settings.resources.run, settings.resources.cache) == ("memory://bucket/settings/runs/a", "/scratch")
    with pytest.raises(SettingsError, match=r"shop.yaml: resources.cache is copies, relative to a file that is not on"):
        load_settings("memory://bucket/settings/shop.yaml", ["resources.cache=copies"])


def test_a_cache_is_a_folder_of_the_host() -> None:
    content = tree()
    content["resources"]["cache"] = "s3://bucket/cache"
    assert "resources: cache s3://bucket/cache is a URL; memory is mapped from a folder" in message(content)


def test_settings_behind_a_package_that_is_missing_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_package(*arguments: Any, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_package)
    with pytest.raises(SettingsError, match=r"cannot read the settings file s3://b/p.yaml: Install s3fs"):
        load_settings("s3://b/p.yaml")


@pytest.mark.parametrize(
    ("path", "run", "found"),
    [
        ("runs/a/interactions", "runs/a", "lies in"),
        ("runs/a", "runs/a/", "lies in"),
        ("runs/a/raw/*.csv", "runs/a", "lies in"),
        ("runs", "runs/a", "holds"),
        ("s3://b/runs/x/../a/e.csv", "s3://b/runs/a", "lies in"),
        ("file:///data/runs/a/e.csv", "runs/a", "lies in"),
    ],
)
def test_a_run_and_what_it_reads_are_kept_apart(path: str, run: str, found: str) -> None:
    for source in ("interactions", "items"):
        content = tree()
        content["task"]["data"]["items"] = {"paths": "items.csv", "key": "k"}
        content["task"]["data"][source] = {**content["task"]["data"][source], "paths": ["good.csv", path]}
        content["resources"]["run"] = run
        text = message(content, base="/data")
        assert f"settings: task.data.{source}.paths has" in text
        assert f", which {found} resources.run" in text


def test_a_site_is_enough_and_its_manual_run_follows_the_live_release() -> None:
    content = tree()
    content["resources"] = {"site": "shop/"}
    resources = parse_settings(content, base="/data").resources
    assert (resources.site, resources.run, resources.reads_live) == ("/data/shop", "/data/shop/runs/manual", True)
    content["resources"]["run"] = "shop/runs/2011-03-05"
    assert not parse_settings(content, base="/data").resources.reads_live
    assert not parse_settings(tree()).resources.reads_live


@pytest.mark.parametrize(("path", "found"), [("shop/x.parquet", "lies in"), (".", "holds")])
def test_a_site_and_what_is_read_are_kept_apart(path: str, found: str) -> None:
    content = tree(data={"interactions": {**INTERACTIONS, "paths": path}})
    content["resources"] = {"site": "shop", "run": "/elsewhere/run"}
    assert f"which {found} resources.site /data/shop; a site's folder is ours" in message(content, base="/data")


@pytest.mark.parametrize("run", ["shop", "shop/releases", "shop/x", "."])
def test_a_run_never_lies_over_the_releases_of_its_site(run: str) -> None:
    content = tree(data={"interactions": {**INTERACTIONS, "paths": "/in/x.csv"}})
    content["resources"] = {"site": "shop", "run": run}
    assert "a run of a site lies in /data/shop/runs, beside" in message(content, base="/data")


@pytest.mark.parametrize("path", ["runs/a.parquet", "runs/ab/e.csv", "runs/*.csv", "s3://b/runs/a/e.csv"])
def test_files_beside_the_run_are_read(path: str) -> None:
    content = tree(data={"interactions": {**INTERACTIONS, "paths": path}})
    assert parse_settings(content, base="/data").resources.run == "/data/runs/a"


def test_an_earlier_run_is_another_run() -> None:
    for previous in ("runs/a", "/data/runs/a/", "file:///data/runs/../runs/a"):
        text = message(tree(data={"interactions": INTERACTIONS, "previous": previous}), base="/data")
        assert "task.data.previous and resources.run are both /data/runs/a;" in text
        assert "give tonight's run a folder of its own" in text


def test_a_file_url_is_a_place_that_relative_paths_can_start_at(tmp_path: Path) -> None:
    write(tmp_path, tree())
    assert load_settings(f"file://{tmp_path}/settings.yaml") == load_settings(str(tmp_path / "settings.yaml"))


def test_a_missing_file_is_named_with_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read the settings file .*nowhere.yaml.*`pinsage init DATA`"):
        load_settings(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(("text", "expected"), [("a: [1", "is not YAML"), ("- 1", "holds a list"), ("", "is empty")])
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=expected) as caught:
        load_settings(str(path))
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        load_settings(str(path))


# ------------------------------------------------------------------------------------------------ overrides


def test_an_override_is_read_as_yaml_and_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, tree(walks={"num_walks": 7}))
    settings = load_settings(
        path,
        ["task.walks.num_walks=500", "task.evaluation.k=[3, 4]", "task.name=a=b", "resources.spark.conf={x: y}"],
    )
    assert settings.task.walks.num_walks == 500
    assert settings.task.evaluation.k == (3, 4)
    assert settings.task.name == "a=b"
    assert settings.resources.spark.conf == {"x": "y"}


def test_an_override_fills_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(tree()).replace("  run: runs/a", "  run: runs/a\n  spark:"), encoding="utf-8")
    assert load_settings(str(path), ["resources.spark.driver_memory=1g"]).resources.spark.driver_memory == "1g"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.walks", "is not of the form dotted.key=value"),
        ("=3", "is not of the form dotted.key=value"),
        ("task.name=[1", "the value is not YAML"),
        ("task.name.deeper=1", "name holds 'shop', not a group of settings"),
        ("task.walks.num_wlks=3", "did you mean num_walks"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        load_settings(write(tmp_path, tree(name="shop")), [override])


# ------------------------------------------------------------------------------------------------ round trips


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1)


@given(
    name=names,
    user=names,
    paths=st.lists(names, min_size=1, max_size=3),
    event_weights=st.dictionaries(names, st.floats(0, 10), min_size=1, max_size=3),
    rate=st.floats(1e-9, 1.0),
    ranks=st.none() | st.tuples(st.integers(1, 50), st.integers(51, 10**6)),
    shards=st.integers(1, 2**40),
)
def test_dumped_settings_load_to_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    user: str,
    paths: list[str],
    event_weights: dict[str, float],
    rate: float,
    ranks: tuple[int, int] | None,
    shards: int,
) -> None:
    apart = [f"{path}.csv" for path in paths]  # the run must not lie in what it reads
    source = {**INTERACTIONS, "user": user, "paths": apart, "event": "kind", "event_weights": event_weights}
    content = tree(
        name=name,
        data={"interactions": source},
        training={"learning_rate": rate},
        pairs={"hard_negative_ranks": ranks},
    )
    content["resources"]["rows_per_shard"] = shards
    settings = parse_settings(content, base="/data")
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(str(path)) == settings


def test_the_fingerprint_leaves_out_where_the_files_lie() -> None:
    moved = tree()
    moved["task"]["data"] = {
        "interactions": {**INTERACTIONS, "paths": ["s3://bucket/other.parquet"]},
        "previous": "old",
    }
    here, there = (select(parse_settings(content), ["task.data", "task.seed"]) for content in (tree(), moved))
    assert here == there
    assert here["task.seed"] == 0
    assert here["task.data"]["interactions"]["user"] == "basket"
    assert "events.parquet" not in str(here)


def test_every_stage_selects_plain_values() -> None:
    settings = parse_settings(tree())
    for stage in STAGES:
        chosen = select(settings, stage.settings)
        assert yaml.safe_load(yaml.safe_dump(chosen)) == chosen


# ------------------------------------------------------------------------------------------------ the reference


def leaves(model: type[Section] | type[Settings], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in model.model_fields.items():
        inner = value.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found |= leaves(inner, f"{prefix}{name}.")
        else:
            found.add(f"{prefix}{name}")
    return found


def test_the_reference_lists_every_setting_with_its_reason() -> None:
    rows = reference()
    listed = [name for name, _, _, _ in rows]
    assert len(listed) == len(set(listed))
    assert leaves(Settings) - {"task.data.items"} <= set(listed)
    assert {"task.data.items.key", "task.data.items.columns[].kind", "task.training.curriculum[].hard"} <= set(listed)
    assert not [name for name, _, _, meaning in rows if not meaning]


def test_the_reference_speaks_of_types_as_a_settings_file_does() -> None:
    types = {name: kind for name, kind, _, _ in reference()}
    assert types["task.data.interactions.event_weights"] == "dict[str, float]"
    assert types["task.data.interactions.weight"] == "str | None"
    assert types["task.evaluation.k"] == "tuple[int, ...]"
    assert types["task.split.kind"] == "temporal | leave_last_out | random"
    assert not [kind for kind in types.values() if "Annotated" in kind or "pipeline." in kind]


def test_every_default_in_the_reference_can_be_pasted_into_a_settings_file() -> None:
    dumped = yaml.safe_load(dump_settings(parse_settings(tree())))
    for name, _, default, _ in reference():
        if default == "required" or "[]" in name or name.startswith("task.data.items."):
            continue
        value: Any = dumped
        for part in name.split("."):
            value = value[part]
        assert yaml.safe_load(default) == value, name


def test_a_file_says_only_how_it_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "grand.yaml").write_text(yaml.safe_dump(tree(walks={"num_walks": 7, "max_hops": 2}, name="grand")))
    (tmp_path / "parent.yaml").write_text("base: grand.yaml\ntask: {name: parent, model: {num_layers: 1}}\n")
    (tmp_path / "settings.yaml").write_text(
        "base: parent.yaml\ntask: {walks: {num_walks: 9}, training: {curriculum: [{from_epoch: 1, uniform: 3}]}}\n"
    )
    task = load_settings(str(tmp_path / "settings.yaml")).task
    assert (task.name, task.model.num_layers, task.walks.num_walks, task.walks.max_hops) == ("parent", 1, 9, 2)
    assert [row.uniform for row in task.training.curriculum] == [3]
    (tmp_path / "settings.yaml").write_text("base: parent.yaml\ntask: {walk: {num_walks: 9}}\n")
    with pytest.raises(SettingsError, match=r"task\.walk: unknown setting; did you mean walks\?"):
        load_settings(str(tmp_path / "settings.yaml"))


@pytest.mark.parametrize("base", ["settings.yaml", "../settings.yaml", "loop.yaml", 3])
def test_a_base_that_cannot_be_meant_is_refused(tmp_path: Path, base: object) -> None:
    (tmp_path / "loop.yaml").write_text("base: settings.yaml\n")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**tree(), "base": base}))
    with pytest.raises(SettingsError, match="expected the name of another settings file in its folder"):
        load_settings(str(tmp_path / "settings.yaml"))


def test_a_base_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("base: gone.yaml\n")
    with pytest.raises(SettingsError, match=r"gone\.yaml: there is no such file"):
        load_settings(str(tmp_path / "settings.yaml"))


SHIPPED = sorted((Path(__file__).resolve().parents[3] / "infra/settings").glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_settings_file_that_is_shipped_loads(file: Path) -> None:
    settings = load_settings(str(file))
    assert settings.resources.run.rpartition("/")[0].endswith("/runs")


def test_the_papers_settings_are_the_papers() -> None:
    task = load_settings(str(SHIPPED[0].parent / "pinsage_paper.yaml")).task
    model, training = task.model, task.training
    assert (model.num_layers, model.hidden_dimensions, model.output_dimensions) == (2, 2048, 1024)
    assert (model.pooling, model.residual, model.head_input, model.fan_outs) == ("importance", False, "last", None)
    assert task.walks.num_neighbours == 50
    assert (training.loss, training.optimizer, training.batch_size, training.warmup_epochs) == (
        "max_margin", "sgd", 2048, 1,
    )  # fmt: skip
    rows = [(row.from_epoch, row.uniform, row.hard) for row in training.curriculum]
    assert rows == [(epoch, 500, epoch - 1) for epoch in range(1, 8)]
    assert not any(row.popular or row.in_batch or row.hardest or row.mined for row in training.curriculum)
    assert training.neighbour_dropout == training.content_dropout == 0
