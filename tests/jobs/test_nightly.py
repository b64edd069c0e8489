"""Nights of a small shop, by the command: published, refused, interrupted, damaged, out of time, told of."""

from __future__ import annotations

import datetime
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyspark import SparkContext

from jobs import nightly
from pipeline import index
from pipeline.contracts import schemas
from pipeline.contracts.config import parse_settings
from pipeline.contracts.datasets import open_manifest
from pipeline.contracts.storage import Storage
from pipeline.nightly import night
from pipeline.releases.catalogue import Catalogue
from tests.jobs.conftest import Outcome, Shop
from tests.synthetic import shop_settings, write_shop

FIRST = datetime.date(2020, 9, 13)
NIGHTS = [(FIRST + datetime.timedelta(days=days)).isoformat() for days in (52, 59, 66)]
DAY = 86_400


class Site(Shop):
    """A shop with nights: its events come as a file a week, twelve baskets a day."""

    @property
    def site(self) -> Path:
        return self.folder / "site"

    def write(self) -> None:
        """The settings, the catalogue, and all events to cut weeks from."""
        write_shop(self.folder, num_users=800)
        table = pq.read_table(self.folder / "interactions.parquet")
        when = _midnight(FIRST) + (table["when"].to_numpy() - 1_600_000_000) * 2
        pq.write_table(table.set_column(2, "when", pa.array(when)), self.folder / "all.parquet")
        (self.folder / "events").mkdir()
        self.configure()

    def configure(self, change: Any = None) -> None:
        tree = shop_settings(self.folder, self.run)
        tree["task"]["data"]["interactions"]["paths"] = str(self.folder / "events" / "*.parquet")
        tree["task"]["training"] |= {"epochs": 4, "learning_rate": 0.01}
        del tree["resources"]["run"]
        tree["resources"] |= {"site": str(self.site), "rows_per_shard": 100, "events_per_shard": 3000}
        if change is not None:
            change(tree)
        self.settings_file.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def deliver(self, night: str, later: int = 0) -> None:
        """The events of a night: since the night before, or, of the first, of all the time before; dated later."""
        table = pq.read_table(self.folder / "all.parquet")
        end = _midnight(datetime.date.fromisoformat(night)) + DAY
        start = end - 7 * DAY if night != NIGHTS[0] else 0
        when = table["when"].to_numpy()
        kept = (when >= start) & (when < end)
        found = table.set_column(2, "when", pa.array(when + later)).filter(pa.array(kept))
        pq.write_table(found, self.folder / "events" / f"{night}.parquet")

    def night(self, date: str, *more: str) -> Outcome:
        """A whole night."""
        return self.pinsage("nightly", "--night", date, *more)

    def told(self, date: str) -> dict[str, Any]:
        """Its summary."""
        found: dict[str, Any] = json.loads((self.site / "nights" / f"{date}.json").read_text())
        return found

    def live(self) -> str | None:
        """The live release."""
        return Catalogue(str(self.site)).pointer()[1].release

    def of(self, night: str) -> Storage:
        """A night's run."""
        return Storage(str(self.site / "runs" / night))


def _midnight(day: datetime.date) -> int:
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.timezone.utc).timestamp())


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory, spark: SparkContext) -> Site:
    """A site with its first night; to be copied, not changed."""
    site = Site(tmp_path_factory.mktemp("nights") / "shop")
    site.write()
    site.deliver(NIGHTS[0])
    outcome = site.night(NIGHTS[0])
    assert outcome.exit_code == 0, outcome.text
    return site


@pytest.fixture
def site(first: Site, tmp_path: Path) -> Site:
    """The same elsewhere; the first night's files keep their time stamps, and their old names in its record."""
    shutil.copytree(first.folder, tmp_path / "shop", ignore=shutil.ignore_patterns("cache"))
    copy = Site(tmp_path / "shop")
    copy.configure()
    record = copy.site / "runs" / NIGHTS[0] / "night.json"
    record.write_text(record.read_text().replace(str(first.folder), str(copy.folder)))
    return copy


def test_the_first_night_is_published_and_says_so(first: Site) -> None:
    told = first.told(NIGHTS[0])
    assert (told["status"], told["run"], told["previous"], told["live"]) == ("published", NIGHTS[0], None, NIGHTS[0])
    assert told["training"]["plan"] == "scratch"
    assert [stage["stage"] for stage in told["stages"]] == [stage.name for stage in schemas.STAGES]
    assert {check["verdict"] for check in told["checks"]} <= {"pass", "skip", "warn"}
    page = (first.site / "nights" / f"{NIGHTS[0]}.html").read_text()
    assert "is what readers see now" in page
    assert "map of items" in page
    assert first.live() == NIGHTS[0]
    shown = first.pinsage("query", "g3-02", "-k", "3")
    assert shown.exit_code == 0, shown.text


def test_the_second_reads_what_is_new_and_keeps_the_model(site: Site) -> None:
    site.deliver(NIGHTS[1])
    outcome = site.night(NIGHTS[1])
    assert outcome.exit_code == 0, outcome.text
    assert "the model is kept" in outcome.text
    assert "1 new files are read" in outcome.text
    assert "inference: find changes" in outcome.text, "inference looks for what it need not make again"
    told = site.told(NIGHTS[1])
    assert (told["status"], told["previous"], told["training"]["nights_old"]) == ("published", NIGHTS[0], 1)
    one, other = (open_manifest(site.of(night), schemas.MODEL).content for night in NIGHTS[:2])
    assert one == other
    rows = open_manifest(site.of(NIGHTS[1]), schemas.INTERACTIONS).num_rows
    delivered = sum(pq.read_metadata(file).num_rows for file in (site.folder / "events").iterdir())
    assert rows == delivered
    assert site.live() == NIGHTS[1]
    assert not (site.site / "runs" / NIGHTS[0] / "layers").exists()
    again = site.night(NIGHTS[1])
    assert (again.exit_code, "has ended with the same data" in again.text) == (0, True), again.text
    (site.folder / "events" / f"{NIGHTS[0]}.parquet").unlink()
    again = site.night(NIGHTS[1])
    assert (again.exit_code, "has ended with the same data" in again.text) == (0, True), again.text
    without = site.night(NIGHTS[2])
    assert "0 new files are read" in without.text
    assert open_manifest(site.of(NIGHTS[2]), schemas.INTERACTIONS).num_rows == rows, "nothing came, and nothing is lost"
    assert (without.exit_code, site.live()) == (3, NIGHTS[1]), without.text
    assert [reason.partition(":")[0] for reason in site.told(NIGHTS[2])["reasons"]] == ["freshness"]
    back = site.pinsage("rollback")
    assert (back.exit_code, site.live()) == (0, NIGHTS[0]), back.text
    for step in ((), ("begin",), ("finish",)):
        again = site.pinsage("nightly", *step, "--night", NIGHTS[1])
        assert (again.exit_code, "has ended with the same data" in again.text) == (0, True), again.text
        assert site.live() == NIGHTS[0], "what was rolled back is not published again"


def test_no_night_begins_while_the_pointer_is_gone(site: Site) -> None:
    """It would go on from nothing, as the first of the site."""
    (site.site / "releases" / "live.json").unlink()
    site.deliver(NIGHTS[1])
    outcome = site.night(NIGHTS[1])
    assert (outcome.exit_code, "live.json is gone" in outcome.text) == (1, True), outcome.text
    assert not (site.site / "runs" / NIGHTS[1]).exists()
    assert site.pinsage("rollback", NIGHTS[0]).exit_code == 0
    assert site.live() == NIGHTS[0]


def test_a_bad_night_is_refused_told_of_and_made_good_by_the_next(site: Site, listener: list[dict[str, Any]]) -> None:
    site.deliver(NIGHTS[1], later=365 * DAY)
    outcome = site.night(NIGHTS[1])
    assert outcome.exit_code == 3, outcome.text
    assert site.live() == NIGHTS[0]
    told = site.told(NIGHTS[1])
    assert told["status"] == "refused"
    assert any(reason.startswith("future") for reason in told["reasons"])
    assert [(sent["night"], sent["status"]) for sent in listener] == [(NIGHTS[1], "refused")]
    assert "s3cr3t" not in outcome.text
    assert "was refused" in (site.site / "nights" / f"{NIGHTS[1]}.html").read_text()
    again = site.night(NIGHTS[1])
    assert (again.exit_code, "has ended" in again.text) == (3, True), again.text
    site.deliver(NIGHTS[1])
    site.deliver(NIGHTS[2])
    outcome = site.night(NIGHTS[2])
    assert outcome.exit_code == 0, outcome.text
    assert "2 new files are read" in outcome.text
    assert (site.live(), site.told(NIGHTS[2])["previous"]) == (NIGHTS[2], NIGHTS[0])


def test_who_knows_better_may_force_a_refused_night(site: Site) -> None:
    """With a reason, which is kept; the stages are not run again."""
    site.deliver(NIGHTS[1], later=365 * DAY)
    assert site.night(NIGHTS[1]).exit_code == 3
    without = site.night(NIGHTS[1], "--force")
    assert (without.exit_code, "needs --reason" in without.text) == (1, True), without.text
    outcome = site.night(NIGHTS[1], "--force", "--reason", "the shop's clock was wrong")
    assert outcome.exit_code == 0, outcome.text
    assert "ingest: up to date" in outcome.text
    assert site.live() == NIGHTS[1]
    told = site.told(NIGHTS[1])
    assert (told["status"], told["forced"]["reason"]) == ("published", "the shop's clock was wrong")
    assert "It was forced by" in (site.site / "nights" / f"{NIGHTS[1]}.html").read_text()


def test_what_stops_or_damages_a_night_costs_it_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of time, then interrupted, then with a changed shard: the night ends as if nothing had been."""
    site.deliver(NIGHTS[1])
    outcome = site.night(NIGHTS[1], "--set", "resources.nightly.budget_hours=0.0003")
    assert outcome.exit_code == 4, outcome.text
    assert site.told(NIGHTS[1])["status"] == "out of time"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index, "run", interrupt)
        assert site.night(NIGHTS[1]).exit_code == 130
    assert site.live() == NIGHTS[0]
    shard = site.site / "runs" / NIGHTS[1] / "embeddings" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    outcome = site.night(NIGHTS[1])
    assert outcome.exit_code == 0, outcome.text
    assert "ingest: up to date" in outcome.text
    assert "made again: embeddings" in outcome.text
    assert site.live() == NIGHTS[1]


def test_a_night_that_was_killed_after_publishing_leaves_its_release_as_it_is(site: Site) -> None:
    """Whatever came since; and one that was rolled back since is made under another name."""
    (site.site / "nights" / f"{NIGHTS[0]}.json").unlink()
    items = site.folder / "items.parquet"
    pq.write_table(pq.read_table(items).slice(1), items)
    before = open_manifest(site.of(NIGHTS[0]), schemas.EMBEDDINGS).content
    outcome = site.night(NIGHTS[0])
    assert (outcome.exit_code, site.live()) == (0, NIGHTS[0]), outcome.text
    assert open_manifest(site.of(NIGHTS[0]), schemas.EMBEDDINGS).content == before
    assert site.told(NIGHTS[0])["status"] == "published"
    site.deliver(NIGHTS[1])
    assert site.night(NIGHTS[1]).exit_code == 0
    (site.site / "nights" / f"{NIGHTS[1]}.json").unlink()
    assert site.pinsage("rollback").exit_code == 0
    outcome = site.night(NIGHTS[1])
    assert outcome.exit_code == 0, outcome.text
    assert site.live() not in (None, *NIGHTS)


def test_a_night_that_was_begun_again_publishes_nothing_that_was_made_before(site: Site) -> None:
    """Else the next night would take for read what is not in the release."""
    site.deliver(NIGHTS[1])
    url = site.pinsage("nightly", "begin", "--night", NIGHTS[1]).text.strip().splitlines()[-1]
    for stage in schemas.STAGES:
        assert Steps(Path(url)).pinsage(stage.name).exit_code == 0
    site.deliver(NIGHTS[2])
    assert "2 new files are read" in site.pinsage("nightly", "begin", "--night", NIGHTS[1]).text
    outcome = site.pinsage("nightly", "finish", "--night", NIGHTS[1])
    assert (outcome.exit_code, site.live()) == (1, NIGHTS[0])
    assert "was made with other files of task.data.interactions.paths than the night was begun with" in outcome.text


def test_a_scheduler_may_take_the_steps(site: Site) -> None:
    """begin, the stages' own jobs, finish; a step out of order says which comes first."""
    site.deliver(NIGHTS[1])
    early = site.pinsage("nightly", "finish", "--night", NIGHTS[1])
    assert (early.exit_code, "was not begun" in early.text) == (1, True), early.text
    begun = site.pinsage("nightly", "begin", "--night", NIGHTS[1])
    early = site.pinsage("nightly", "finish", "--night", NIGHTS[1])
    assert (early.exit_code, "run `pinsage ingest` to build it" in early.text) == (1, True), early.text
    assert site.told(NIGHTS[1])["status"] == "failed"
    begun = site.pinsage("nightly", "begin", "--night", NIGHTS[1])
    assert begun.exit_code == 0, begun.text
    url = begun.text.strip().splitlines()[-1]
    assert url == f"{site.site}/runs/{NIGHTS[1]}/settings.yaml"
    for stage in schemas.STAGES:
        outcome = Steps(Path(url)).pinsage(stage.name)
        assert outcome.exit_code == 0, outcome.text
    outcome = site.pinsage("nightly", "finish", "--night", NIGHTS[1])
    assert (outcome.exit_code, site.live()) == (0, NIGHTS[1]), outcome.text


def test_what_a_night_failed_of_is_told_without_secrets(tmp_path: Path) -> None:
    """Also of an error that is not ours, whose words may be anything."""
    write_shop(tmp_path)
    settings = parse_settings(shop_settings(tmp_path, tmp_path / "run"))
    steps = nightly.Steps(Storage(str(tmp_path / "site")), settings, NIGHTS[0])
    tonight = night.decide(settings, NIGHTS[0], NIGHTS[0], None, None, night.snapshot(settings))
    with pytest.raises(RuntimeError), steps.failing(tonight):
        raise RuntimeError("cannot read s3://KEY:s3cr3t@bucket/shop")
    told = (tmp_path / "site" / "nights" / f"{NIGHTS[0]}.json").read_text()
    assert "cannot read s3://***@bucket/shop" in told
    assert "s3cr3t" not in told + (tmp_path / "site" / "nights" / f"{NIGHTS[0]}.html").read_text()


class Steps(Shop):
    """Commands with the settings that `begin` made."""

    @property
    def settings_file(self) -> Path:
        return self.folder


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a webhook is sent; its address has a secret."""
    found: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("PINSAGE_WEBHOOK", f"http://127.0.0.1:{server.server_port}/s3cr3t")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
