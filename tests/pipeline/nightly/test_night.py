"""What a night does, from what the live release's night did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts.config import Settings, parse_settings
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.storage import Storage
from pipeline.nightly import night
from pipeline.nightly.night import Night
from tests.synthetic import shop_settings, write_shop


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The small shop's, with a site."""
    write_shop(tmp_path)
    tree = shop_settings(
        tmp_path, tmp_path / "site" / "runs" / "manual", nightly={"train_every": 3, "scratch_every": 7}
    )
    tree["resources"]["site"] = str(tmp_path / "site")
    return parse_settings(tree)


def _nights(settings: Settings, count: int) -> list[Night]:
    """So many nights, each published."""
    made: list[Night] = []
    for number in range(1, count + 1):
        live, before = (made[-1].run, made[-1]) if made else (None, None)
        name = f"2011-03-{number:02d}"
        made.append(night.decide(settings, name, name, live, before, night.snapshot(settings)))
    return made


def test_training_comes_every_few_nights_and_from_nothing_more_rarely(settings: Settings) -> None:
    plans = [one.training for one in _nights(settings, 10)]
    assert plans == ["scratch", "reuse", "reuse", "warm", "reuse", "reuse", "warm", "scratch", "reuse", "reuse"]


def test_another_model_or_other_features_are_trained_from_nothing(settings: Settings) -> None:
    before = _nights(settings, 2)[-1]
    changed = settings.model_copy(
        update={
            "task": settings.task.model_copy(update={"model": settings.task.model.model_copy(update={"num_layers": 1})})
        }
    )
    tonight = night.decide(changed, "2011-03-03", "2011-03-03", before.run, before, night.snapshot(changed))
    assert (tonight.training, tonight.previous) == ("scratch", before.run)
    assert "changed since" in tonight.reason


def test_a_release_that_no_night_made_gives_its_ids_alone(settings: Settings) -> None:
    tonight = night.decide(settings, "2011-03-03", "2011-03-03", "manual", None, night.snapshot(settings))
    assert (tonight.training, tonight.previous) == ("scratch", "manual")


@pytest.mark.parametrize(("plan", "epochs"), [("scratch", 2), ("warm", 1), ("reuse", 0)])
def test_the_settings_of_the_run_follow(settings: Settings, plan: Any, epochs: int) -> None:
    tonight = replace(_nights(settings, 2)[-1], training=plan)
    made = night.settings_of(tonight, settings, str(settings.resources.site))
    runs = f"{settings.resources.site}/runs"
    earlier = None if plan == "scratch" else f"{runs}/2011-03-01"
    assert made.resources.run == f"{runs}/2011-03-02"
    assert made.task.data.previous == f"{runs}/2011-03-01"
    assert (made.task.features.previous, made.task.training.previous) == (earlier, earlier)
    assert made.task.training.epochs == epochs
    assert made.resources.inference.keep_layers


def test_the_files_are_those_of_the_beginning(settings: Settings, tmp_path: Path) -> None:
    """A glob is read once: what is added while a night runs belongs to the next one."""
    tree = settings.model_dump()
    tree["task"]["data"]["interactions"]["paths"] = (str(tmp_path / "*ons.parquet"),)
    globbed = parse_settings(tree)
    tonight = night.decide(globbed, "2011-03-05", "2011-03-05", None, None, night.snapshot(globbed))
    (tmp_path / "more-interactions.parquet").write_bytes((tmp_path / "interactions.parquet").read_bytes())
    made = night.settings_of(tonight, globbed, str(globbed.resources.site))
    assert [Path(path).name for path in made.task.data.interactions.paths] == ["interactions.parquet"]
    later = night.decide(globbed, "2011-03-05", "2011-03-05", None, None, night.snapshot(globbed))
    assert later.fingerprint != tonight.fingerprint


def test_a_decision_is_kept_and_tries_are_counted(settings: Settings) -> None:
    site = Storage(str(settings.resources.site))
    tonight = _nights(settings, 1)[0]
    url = night.write(site, tonight, night.settings_of(tonight, settings, site.url))
    assert night.read(site, tonight.run) == tonight
    assert url == f"{site.url}/runs/2011-03-01/settings.yaml"
    for name in ("2011-03-01-2", "2011-03-01-10", "2011-03-010", "2011-03-01-x", "2011-03-02"):
        site.write_bytes(f"runs/{name}/x", b"")
    names = night.attempts(site, "2011-03-01")
    assert names == ["2011-03-01", "2011-03-01-2", "2011-03-01-10"]
    assert night.next_attempt(names, "2011-03-01") == "2011-03-01-11"
    assert night.read(site, "2011-03-02") is None
    site.write_bytes("runs/2011-03-02/night.json", b"{}")
    with pytest.raises(DataError, match="no night's record"):
        night.read(site, "2011-03-02")


def test_a_night_is_a_date() -> None:
    assert night.checked_date("2011-03-05") == "2011-03-05"
    assert len(night.checked_date(None)) == 10
    with pytest.raises(SettingsError, match="expected a date"):
        night.checked_date("yesterday")


def _with_more(settings: Settings, tmp_path: Path, names: list[str]) -> Settings:
    """The same with more files of interactions."""
    tree = settings.model_dump()
    tree["task"]["data"]["interactions"]["paths"] = tuple(str(tmp_path / name) for name in names)
    for name in names:
        if not (tmp_path / name).exists():
            (tmp_path / name).write_bytes((tmp_path / "interactions.parquet").read_bytes())
    return parse_settings(tree)


def test_only_new_files_are_read_and_those_before_may_be_gone(settings: Settings, tmp_path: Path) -> None:
    before = _nights(settings, 1)[0]
    assert before.appended is None
    more = _with_more(settings, tmp_path, ["interactions.parquet", "b.parquet"])
    second = night.decide(more, "2011-03-02", "2011-03-02", before.run, before, night.snapshot(more))
    made = night.settings_of(second, more, str(more.resources.site))
    assert [Path(path).name for path in made.task.data.interactions.paths] == ["b.parquet"]
    assert made.task.data.append
    alone = _with_more(settings, tmp_path, ["c.parquet"])
    third = night.decide(alone, "2011-03-03", "2011-03-03", second.run, second, night.snapshot(alone))
    assert [Path(url).name for url in third.appended or ()] == ["c.parquet"]
    names = [Path(file["url"]).name for file in third.inputs["interactions"]]
    assert names == ["interactions.parquet", "b.parquet", "c.parquet"]


def test_a_changed_file_or_none_that_is_new_reads_all(settings: Settings, tmp_path: Path) -> None:
    before = _nights(settings, 1)[0]
    again = night.decide(settings, "2011-03-02", "2011-03-02", before.run, before, night.snapshot(settings))
    assert again.appended is None
    more = _with_more(settings, tmp_path, ["interactions.parquet", "b.parquet"])
    (tmp_path / "interactions.parquet").touch()
    changed = night.decide(more, "2011-03-02", "2011-03-02", before.run, before, night.snapshot(more))
    assert changed.appended is None
    made = night.settings_of(changed, more, str(more.resources.site))
    assert len(made.task.data.interactions.paths) == 2
    assert not made.task.data.append


def test_files_that_are_gone_lose_no_events(settings: Settings, tmp_path: Path) -> None:
    """Where none is new, nothing is added; where another was changed, nothing can be made that has all."""
    more = _with_more(settings, tmp_path, ["interactions.parquet", "b.parquet"])
    before = _nights(more, 1)[0]
    left = _with_more(settings, tmp_path, ["b.parquet"])
    second = night.decide(left, "2011-03-02", "2011-03-02", before.run, before, night.snapshot(left))
    made = night.settings_of(second, left, str(left.resources.site))
    assert (second.appended, second.inputs) == ([], before.inputs)
    assert (made.task.data.interactions.paths, made.task.data.append) == ((), True)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-1])
    for settings_now in (left, _with_more(settings, tmp_path, ["b.parquet", "c.parquet"])):
        told = r"b.parquet was changed .*/interactions.parquet is gone, as 1 of 2 .*set task.nightly.append: false"
        with pytest.raises(DataError, match=told):
            night.decide(settings_now, "2011-03-02", "2011-03-02", before.run, before, night.snapshot(settings_now))
    tree = left.model_dump()
    tree["task"]["nightly"]["append"] = False
    without = parse_settings(tree)
    last = night.decide(without, "2011-03-02", "2011-03-02", before.run, before, night.snapshot(without))
    assert [Path(file["url"]).name for file in last.inputs["interactions"]] == ["b.parquet"]
