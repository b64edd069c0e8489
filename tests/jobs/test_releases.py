"""The commands of releases, as a person types them, and readers that follow the live one."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.releases import opened
from pipeline.contracts.config import load_settings
from pipeline.releases.catalogue import Catalogue
from tests.jobs.conftest import Outcome, Shop
from tests.releases import write_run
from tests.synthetic import shop_settings


class Site:
    """A site on a disk, its settings, and what one can type there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, folder / "pinsage.yaml"
        tree = shop_settings(folder / "data", folder / "x")
        tree["resources"] |= {"site": str(folder / "site"), "releases": {"keep_count": 1, "keep_days": 0.0}}
        del tree["resources"]["run"]
        self.settings.write_text(yaml.safe_dump(tree))

    @property
    def url(self) -> str:
        return str(self.folder / "site")

    def pinsage(self, *arguments: str) -> Outcome:
        result = CliRunner().invoke(app, [*arguments, "--settings", str(self.settings)], env={"COLUMNS": "200"})
        return Outcome(result.exit_code, " ".join(result.output.split()))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Three nights, none published."""
    found = Site(tmp_path)
    for night in range(3):
        write_run(found.url, f"n{night}", night, model=f"model {night}")
    return found


def test_a_night_is_published_listed_queried_and_taken_back(site: Site) -> None:
    assert "has no live release yet; `pinsage publish` makes a run one" in site.pinsage("query", "night0-1").text
    for night in ("n0", "n1"):
        assert f"release {night} is live: 12 items, recall 1.000" in site.pinsage("publish", night).text
    assert "night1-1 night1-1" in site.pinsage("query", "night1-1").text
    assert "night0-1 night0-1" in site.pinsage("query", "night0-1", "--release", "n0").text
    assert site.pinsage("rollback").text == "release n0 is live again: 12 items, recall 1.000"
    assert "night0-1 night0-1" in site.pinsage("query", "night0-1").text
    refused = site.pinsage("query", "night1-1")
    assert (refused.exit_code, "night1-1" in refused.text) == (1, True)
    table = site.pinsage("releases").text
    assert "live" in table
    assert "withdrawn" in table
    listed = json.loads(site.pinsage("releases", "--json").text)
    assert [(one["record"]["release"], one["live"]) for one in listed["releases"]] == [("n0", True), ("n1", False)]


def test_gc_says_what_goes_then_lets_it_go(site: Site) -> None:
    for night in ("n0", "n1", "n2"):
        site.pinsage("publish", night)
    assert "release n0 is pinned" in site.pinsage("pin", "n0", "--reason", "audit").text
    assert "deleted 0 releases" in site.pinsage("gc").text
    site.pinsage("unpin", "n0")
    planned = site.pinsage("gc", "--dry-run").text
    assert "would delete release n0" in planned
    assert "kept n1: a rollback leads to it kept n2: live" in planned
    assert (site.folder / "site" / "runs" / "n0").exists()
    assert site.pinsage("gc").text == planned.replace("would delete", "deleted")
    assert not (site.folder / "site" / "runs" / "n0").exists()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("publish",), "runs/manual has no users yet; run `pinsage ingest` to build it"),
        (("publish", "/elsewhere/n0"), "/elsewhere/n0 is not a run of"),
        (("publish", "../n0"), "is not a run of"),
        (("rollback",), "has no previous release to go back to"),
        (("rollback", "n9"), "has no release n9"),
        (("pin", ".."), "'..' cannot be a release"),
        (("query", "x", "--release", "../n0"), "'../n0' cannot be a release"),
    ],
)
def test_what_cannot_be_done_is_one_message(site: Site, arguments: tuple[str, ...], found: str) -> None:
    Catalogue(site.url).publish("n0")
    outcome = site.pinsage(*arguments)
    assert outcome.exit_code == 1, outcome.text
    assert found in outcome.text
    assert "Traceback" not in outcome.text


def test_without_a_site_the_commands_ask_for_one(site: Site) -> None:
    outcome = site.pinsage("releases", "--set", "resources.site=null", "--set", f"resources.run={site.url}/runs/n0")
    assert "resources.site is not given, and releases lie in a site" in outcome.text
    assert (
        "night0-1"
        in site.pinsage("query", "night0-1", "--release", "run", "--set", f"resources.run={site.url}/runs/n0").text
    )


def test_of_a_release_the_task_is_the_one_it_was_made_with(site: Site) -> None:
    tree = yaml.safe_load(site.settings.read_text())
    tree["task"]["walks"]["num_neighbours"] = 7
    (site.folder / "site" / "runs" / "n0" / "settings.yaml").write_text(yaml.safe_dump(tree))
    Catalogue(site.url).publish("n0")
    settings = load_settings(str(site.settings))
    with opened(settings, None) as (loaded, release):
        assert release is not None
        assert (release.id, loaded.resources.run) == ("n0", f"{site.url}/runs/n0")
        assert loaded.task.walks.num_neighbours == 7
        assert loaded.resources.cache == settings.resources.cache
    with opened(settings, "run") as (loaded, release):
        assert (release, loaded) == (None, settings)


@pytest.mark.parametrize("release", ["live", "run"])
def test_a_remote_index_is_copied_to_the_cache_of_the_settings(site: Site, release: str) -> None:
    far = f"memory://{uuid.uuid4()}"
    write_run(far, "n0", 0)
    Catalogue(far).publish("n0")
    tree = yaml.safe_load(site.settings.read_text())
    tree["resources"] |= {"site": far, "cache": str(site.folder / "copies"), "run": f"{far}/runs/n0"}
    site.settings.write_text(yaml.safe_dump(tree))
    assert "night0-1 night0-1" in site.pinsage("query", "night0-1", "--release", release).text
    assert len(list((site.folder / "copies").rglob("index.faiss"))) == 1


@pytest.mark.slow
def test_a_real_run_becomes_a_release_that_embeds_new_items(finished: Shop, tmp_path: Path) -> None:
    shop = finished.copy(tmp_path / "shop")
    runs = tmp_path / "shop" / "site" / "runs"
    runs.mkdir(parents=True)
    shop.run.rename(runs / "2011-03-05")
    places = {"site": str(tmp_path / "shop" / "site"), "run": str(runs / "2011-03-05")}
    shop.configure(lambda tree: tree["resources"].update(places))
    outcome = shop.pinsage("publish", "--verify")
    assert "release 2011-03-05 is live: 73 items, recall 1.000, hit-rate@10 0." in outcome.text, outcome.text
    (tmp_path / "new.jsonl").write_text(json.dumps({"product": "new", "name": "red lonely thing", "price": None}))
    for arguments in (("--release", "live"), ("--release", "2011-03-05"), ("--release", "run")):
        outcome = shop.pinsage("embed", str(tmp_path / "new.jsonl"), "-k", "1", *arguments)
        assert json.loads(outcome.text)["nearest"] == ["lonely"], outcome.text
