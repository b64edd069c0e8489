"""`pinsage nightly`: yesterday's release and today's data to a better release, or to the old one and a reason.

    pinsage nightly --settings pinsage.yaml                       # the night of today (UTC); resumes if interrupted
    pinsage nightly begin --settings FILE --night 2011-03-05      # for schedulers: decides, and prints the settings of
    spark-submit jobs/STAGE.py --settings THOSE                   # every stage's job
    pinsage nightly finish --settings FILE --night 2011-03-05     # gate, publish, tidy up, report, notify

Exit codes: 0 published, 3 refused by the gate, 4 out of time, 1 an error, 130 interrupted.
"""

from __future__ import annotations

import datetime
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from jobs.gate import REFUSED, force_of, print_verdict, read_history
from jobs.releases import site_of
from jobs.stage import (
    NETWORK,
    OverrideOption,
    SettingsOption,
    console,
    exit_codes,
    import_stages,
    run_stages,
    spark_session,
)
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, load_settings, select
from pipeline.contracts.datasets import Lineage, find_manifest, open_manifest, read_file, withdraw_broken
from pipeline.contracts.errors import DataError, PipelineError, ResourceError
from pipeline.contracts.safety import printable, redact
from pipeline.contracts.storage import Storage
from pipeline.inference.ways import let_go
from pipeline.nightly import lock, night, summary
from pipeline.nightly.night import Night
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.records import RUNS
from pipeline.releases.retention import collect
from pipeline.session import launch

if TYPE_CHECKING:
    from pipeline.gate.stage import Force

_MENDED = 3
"""So often in a night is what lies damaged on storage made again."""
OUT_OF_TIME = 4
"""Exit code of a night that its budget stopped; the same command goes on."""
NightOption = Annotated[str | None, typer.Option("--night", help="The night's date. Default: today, UTC.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Publish even if the gate refuses; needs --reason.")]
ReasonOption = Annotated[str | None, typer.Option(help="Why it is forced: kept in the verdict and the summary.")]

app = typer.Typer(
    invoke_without_command=True, help="A whole night: what is new, embedded, judged, and published or refused."
)


class OutOfTimeError(ResourceError):
    """The night's budget is spent."""

    explains_interrupt = True


@app.callback()
def nightly(
    context: typer.Context,
    date: NightOption = None,
    force: ForceOption = False,
    reason: ReasonOption = None,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """A whole night: what is new, embedded, judged, and published or refused. Resumes what was interrupted."""
    if context.invoked_subcommand is not None:
        return
    with exit_codes():
        forced = force_of(force, reason)
        with steps_of(settings, override, date) as steps:
            tonight = steps.begin()
            if tonight is None and forced is not None:
                tonight = steps.latest()  # the gate refused it, and somebody knows better
            code = steps.done_before() if tonight is None else steps.run(tonight, forced)
    raise SystemExit(code)


@app.command()
def begin(date: NightOption = None, settings: SettingsOption = "pinsage.yaml", override: OverrideOption = None) -> None:
    """Decide what the night does, keep that, and print the settings for the stages' jobs."""
    with exit_codes():
        with steps_of(settings, override, date) as steps:
            tonight = steps.begin()
            if tonight is None:
                steps.done_before()
                tonight = steps.latest()
        print(f"{steps.run_of(tonight.run).url}/{schemas.RESOLVED}")


@app.command()
def finish(
    date: NightOption = None,
    force: ForceOption = False,
    reason: ReasonOption = None,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Judge what the stages made, publish it or say why not, delete what is old, tell whoever waits."""
    with exit_codes():
        forced = force_of(force, reason)
        with steps_of(settings, override, date) as steps:
            tonight = steps.latest()
            with steps.failing(tonight):
                is_over = forced is None and steps.was_left(tonight)
                code = steps.done_before() if is_over else steps.finish(tonight, forced)
    raise SystemExit(code)


class Steps:
    """The steps of a night, each of which may be done again after a kill."""

    def __init__(self, site: Storage, settings: Settings, name: str) -> None:
        self.site, self.settings, self.name = site, settings, name
        self.catalogue = Catalogue(site.url)
        self.started = time.time()

    def run_of(self, name: str) -> Storage:
        """The folder of a run of the site."""
        return Storage(f"{self.site.url.rstrip('/')}/{RUNS}/{name}")

    def begin(self) -> Night | None:
        """Decide, or take the decision of the interrupted night; None if the night has ended with the same data."""
        names = night.attempts(self.site, self.name)
        last = night.read(self.site, names[-1]) if names else None
        ended = summary.read(self.site, self.name)
        has_ended = ended is not None and last is not None and ended["run"] == last.run and _is_final(ended)
        pointer = self.catalogue.kept_pointer(own=() if has_ended else names[-1:])
        live = pointer.release
        if last is not None and live == last.run and not has_ended:
            return last  # published, and killed before it could say so
        before = None if live is None else night.read(self.site, live)
        is_over = not names or has_ended or names[-1] in pointer.released  # published, and rolled back by hand
        run = night.next_attempt(names, self.name) if is_over else names[-1]
        tonight = night.decide(self.settings, self.name, run, live, before, night.snapshot(self.settings))
        if last is not None and last.fingerprint == tonight.fingerprint:
            if has_ended:
                return None
            if (last.previous, last.run) == (tonight.previous, run):
                tonight = last
        night.write(self.site, tonight, night.settings_of(tonight, self.settings, self.site.url))
        told = {"scratch": "trained from random weights", "warm": "trained further", "reuse": "kept"}
        on = "from nothing" if tonight.previous is None else f"on top of {tonight.previous}"
        console.print(
            f"night {self.name}, run {tonight.run}, {on}: the model is {told[tonight.training]}, as {tonight.reason}; "
            + ("all files are read" if tonight.appended is None else f"{len(tonight.appended)} new files are read"),
            soft_wrap=True,
        )
        return tonight

    def latest(self) -> Night:
        """The night as it was begun. Raises DataError if it was not."""
        names = night.attempts(self.site, self.name)
        found = night.read(self.site, names[-1]) if names else None
        if found is None:
            raise DataError(f"{self.site.url}: night {self.name} was not begun; run `pinsage nightly begin` first")
        return found

    def was_left(self, tonight: Night) -> bool:
        """Whether readers had the night's release and were led elsewhere since: then it is not published again."""
        ended, pointer = summary.read(self.site, self.name), self.catalogue.kept_pointer(own=(tonight.run,))
        is_told = ended is not None and (ended["run"], ended["status"]) == (tonight.run, "published")
        return is_told and tonight.run in pointer.released and tonight.run != pointer.release

    def done_before(self) -> int:
        """Say how the night ended when it ran; the exit code of then."""
        ended = summary.read(self.site, self.name)
        assert ended is not None, "begin found it"
        console.print(f"night {self.name} has ended with the same data and settings: {ended['status']}")
        return REFUSED if ended["status"] == "refused" else 0

    def run(self, tonight: Night, forced: Force | None) -> int:
        """All stages and the end, on one Spark session."""
        settings = night.settings_of(tonight, self.settings, self.site.url)
        launch(settings.resources.spark, NETWORK)
        import_stages()
        try:
            limit = budget(self.settings.resources.nightly.budget_hours)
            with self.failing(tonight), spark_session(settings, NETWORK), limit:
                return self._mended(settings, lambda: self._stages_and_finish(tonight, settings, forced))
        except OutOfTimeError as error:
            self._tell(tonight, "out of time", [str(error)])
            console.print(f"[yellow]out of time:[/] {escape(str(error))}", soft_wrap=True)
            return OUT_OF_TIME

    @contextmanager
    def failing(self, tonight: Night) -> Iterator[None]:
        """Whatever ends the block early is told of as a night that failed, if that can be stored."""
        try:
            yield
        except OutOfTimeError:
            raise
        except Exception as error:
            with suppress(PipelineError):
                said = str(error) if isinstance(error, PipelineError) else printable(redact(repr(error)))
                self._tell(tonight, "failed", [said])
            raise

    def _stages_and_finish(self, tonight: Night, settings: Settings, forced: Force | None) -> int:
        if self.catalogue.pointer()[1].release != tonight.run:  # else published, and killed before it could say so
            run_stages(schemas.STAGES, settings)
        return self.finish(tonight, forced)

    def _mended(self, settings: Settings, work: Callable[[], int]) -> int:
        """What work gives; what is found damaged on storage when it fails is made again, a few times."""
        for remaining in range(_MENDED, -1, -1):
            try:
                return work()
            except OutOfTimeError:
                raise
            except Exception as error:
                broken = withdraw_broken(Storage(settings.resources.run)) if remaining else []
                if not broken:
                    raise
                console.print(f"[yellow]damaged:[/] {escape(str(error))}", soft_wrap=True)
                console.print(f"made again: {', '.join(broken)}", soft_wrap=True)
        raise AssertionError("unreachable")

    def finish(self, tonight: Night, forced: Force | None) -> int:
        """Gate, publish, tidy up, tell; the exit code."""
        settings = night.settings_of(tonight, self.settings, self.site.url)
        run = Storage(settings.resources.run)
        live = self.catalogue.kept_pointer(own=(tonight.run,)).release
        if live == tonight.run:  # a kill between publishing and telling
            verdict = _verdict(run)
        else:
            _check_begun(run, settings)
            verdict = self._judge(run, settings, live, forced)
            print_verdict(verdict)
        blocked = [f"{check['name']}: {check['reason']}" for check in verdict["checks"] if check["verdict"] == "block"]
        if blocked and not verdict["forced"]:
            self._tell(tonight, "refused", blocked, verdict)
            return REFUSED
        record = self.catalogue.publish(tonight.run, verify=True)
        console.print(f"release {record.release} is live: {record.num_items:,} items")
        self._tidy(tonight)
        self._tell(tonight, "published", blocked, verdict)
        return 0

    def _judge(self, run: Storage, settings: Settings, live: str | None, forced: Force | None) -> dict[str, Any]:
        from pipeline.gate.stage import judge  # imported here, as are pages: what they need takes a while

        past = read_history(f"{self.site.url.rstrip('/')}/{summary.NIGHTS}")
        before, date = None if live is None else self.run_of(live), datetime.date.fromisoformat(self.name)
        with spark_session(settings) as spark:
            return judge(spark, run, settings, before, past, date, forced)

    def _tidy(self, tonight: Night) -> None:
        """Delete old releases and runs, and the layers of the run before: only the live one's are gone on from."""
        kept = self.settings.resources.releases
        try:
            gone = collect(
                self.catalogue, kept.keep_count, kept.keep_days, kept.clock_skew_seconds, keep=(tonight.run,)
            )
            for name in {**gone.releases, **gone.runs}:
                console.print(f"deleted {name}")
            if tonight.previous is not None:
                let_go(self.run_of(tonight.previous))
        except PipelineError as error:
            console.print(f"[yellow]nothing old was deleted:[/] {escape(str(error))}", soft_wrap=True)

    def _tell(
        self, tonight: Night, status: summary.Status, reasons: list[str], verdict: Mapping[str, Any] | None = None
    ) -> None:
        run = self.run_of(tonight.run)
        told = {
            "night": self.name, "run": tonight.run, "status": status, "reasons": reasons, "previous": tonight.previous,
            "files_read": None if tonight.appended is None else len(tonight.appended),
            "training": {"plan": tonight.training, "reason": tonight.reason, "nights_old": tonight.since_training},
            "started_at": self.started, "ended_at": time.time(), "stages": summary.stages(run),
            "checks": [] if verdict is None else verdict["checks"],
            "tonight": None if verdict is None else verdict["tonight"],
            "quality": None if verdict is None else verdict["quality"],
            "forced": None if verdict is None else verdict["forced"],
            "live": self.catalogue.pointer()[1].release,
        }  # fmt: skip
        console.print(f"night {self.name}: {status}; summary in {summary.write(self.site, self.name, told)}")
        self._draw(told, run if verdict is not None else None)
        problem = summary.notify(told)
        if problem:
            console.print(f"[yellow]not told:[/] {escape(problem)}", soft_wrap=True)

    def _draw(self, told: Mapping[str, Any], run: Storage | None) -> None:
        """The night's page; without one the night has ended all the same."""
        from pipeline.nightly import page

        before = None if told["previous"] is None else self.run_of(told["previous"])
        try:
            nights = [ended for ended in summary.read_all(self.site) if ended["night"] <= self.name]
            seen = None
            if run is not None:
                seen = page.look(run, before, self.settings.resources.cache, self.settings.task.seed)
            path = f"{summary.NIGHTS}/{self.name}.html"
            self.site.write_bytes(path, page.render(told, nights, seen).encode())
            console.print(f"report: {self.site.locate(path)}", soft_wrap=True)
        except Exception as error:
            console.print(f"[yellow]no report:[/] {escape(printable(redact(repr(error))))}", soft_wrap=True)


def _verdict(run: Storage) -> dict[str, Any]:
    manifest = find_manifest(run, schemas.GATE)
    if manifest is None:
        raise DataError(f"{run.url} is live, and its gate has no verdict; was it published by hand?")
    verdict: dict[str, Any] = json.loads(read_file(run, manifest, "verdict.json"))
    return verdict


def _check_begun(run: Storage, settings: Settings) -> None:
    """Raise DataError if events or model were made before the night was begun again, with other files or another plan.

    What a release has read must be what the night says of it: the next one reads only what came since. A file that was
    written again meanwhile is one that the next night will see.
    """
    data, training = settings.task.data, settings.task.training
    for stage, dataset in ((schemas.INGEST, schemas.INTERACTIONS), (schemas.TRAIN, schemas.MODEL)):
        made = open_manifest(run, dataset).lineage
        wanted = json.loads(json.dumps(select(settings, stage.settings)))
        other = [
            name for name, value in wanted.items() if name.startswith("task.") and made.settings.get(name) != value
        ]
        if dataset is schemas.MODEL:
            other += _other_content(made, "previous model", training.previous, schemas.MODEL)
        else:
            files = sum(name.startswith("interactions path ") for name in made.inputs)
            other += [] if files == len(data.interactions.paths) else ["files of task.data.interactions.paths"]
            append = data.previous if data.append else None
            other += _other_content(made, "previous interactions", append, schemas.INTERACTIONS)
        if other:
            raise DataError(
                f"{run.locate(dataset.name)} was made with other {', '.join(other)} than the night was begun with; run "
                "the stages again, with the settings that `pinsage nightly begin` has written"
            )


def _other_content(made: Lineage, name: str, url: str | None, dataset: schemas.Dataset) -> list[str]:
    """The name, if what was made goes on from another content than a run's dataset has."""
    content = None if url is None else open_manifest(Storage(url), dataset).content
    return [] if made.inputs.get(name) == content else [name]


def _is_final(ended: Mapping[str, Any]) -> bool:
    return ended["status"] in ("published", "refused")


@contextmanager
def steps_of(settings: str, override: list[str] | None, date: str | None) -> Iterator[Steps]:
    """The steps of a night of the site that the settings name, which nobody else takes while the block runs."""
    loaded, name = load_settings(settings, override or ()), night.checked_date(date)
    site = Storage(site_of(loaded))
    site.check_writable()
    with lock.hold(site, name, f"{RUNS}/{name}"):
        yield Steps(site, loaded, name)


@contextmanager
def budget(hours: float | None) -> Iterator[None]:
    """Stop what the block does after so long, as an interrupt would. Raises OutOfTimeError then."""
    if hours is None:
        yield
        return
    spent: list[bool] = []

    def stop(number: int, frame: FrameType | None) -> None:
        spent.append(True)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, hours * 3600)
    try:
        yield
    except KeyboardInterrupt:
        if not spent:
            raise
        raise OutOfTimeError(
            f"the {hours:g} hours of resources.nightly.budget_hours are over; the same command goes on"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
