"""`pinsage publish`, `rollback`, `releases`, `pin`, `unpin` and `gc`: which run of a site readers see.

pinsage publish --settings pinsage.yaml          # resources.run, or a run's name, becomes the live release
pinsage rollback --settings pinsage.yaml         # the one before it is live again; under a second
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.stage import OverrideOption, SettingsOption, exit_codes
from pipeline.contracts.config import Settings, load_settings
from pipeline.contracts.errors import SettingsError
from pipeline.contracts.schemas import RESOLVED
from pipeline.releases.catalogue import Catalogue, Listed
from pipeline.releases.retention import collect, make_plan

if TYPE_CHECKING:
    from pipeline.ann.reader import Index
    from pipeline.releases.reading import Release

PANEL = "Releases"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)

ReleaseArgument = Annotated[str, typer.Argument(help="Its id: the name of its run's folder.")]
ReleaseOption = Annotated[
    str | None,
    typer.Option(
        help="A release's id, `live`, or `run`: the run that the settings name. Default: live if they have a site and "
        "no run, else run."
    ),
]


def site_of(settings: Settings) -> str:
    """The site that the settings name."""
    if settings.resources.site is None:
        raise SettingsError(
            "resources.site is not given, and releases lie in a site; set it to a folder or URL, and resources.run to "
            "SITE/runs/NAME"
        )
    return settings.resources.site


@contextmanager
def opened(settings: Settings, release: str | None) -> Iterator[tuple[Settings, Release | None]]:
    """The settings to read a release or, without one, the run by; the release is held while the block runs.

    Of a release the task is the one that it was made with. release: as the option of `pinsage query`.
    """
    resources = settings.resources
    name = release or ("live" if resources.reads_live else "run")
    if name == "run":
        yield settings, None
        return
    from pipeline.releases.reading import Releases  # imported here, as faiss takes a while

    with Releases(site_of(settings), resources.cache, resources.releases.lease_seconds).open(name) as found:
        changes: dict[str, Any] = {"resources": resources.model_copy(update={"run": found.url})}
        with suppress(FileNotFoundError):
            found.storage.read_bytes(RESOLVED)
            changes["task"] = load_settings(f"{found.url}/{RESOLVED}").task
        yield settings.model_copy(update=changes), found


def open_index(settings: Settings, release: Release | None) -> Index:
    """What `opened` gave, as an index: of the release, if it is what was published; without one, of the run."""
    from pipeline.ann.reader import Index

    with _stdout_kept():
        return release.index if release is not None else Index.open(settings.resources.run, settings.resources.cache)


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """What FAISS says of lists that lie in a file of their own goes to stderr: stdout is for what was asked."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def publish(
    run: Annotated[str | None, typer.Argument(help="A run below the site's runs/: its name or URL.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Publish what the gate refused; the record says so.")] = False,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Make a run (default: resources.run) the live release, if it is whole and of one lineage."""
    with exit_codes():
        loaded = load_settings(settings, override or ())
        record = Catalogue(site_of(loaded)).publish(run or loaded.resources.run, verify, force)
        console.print(f"release {record.release} is live: {record.num_items:,} items, {_quality(record.quality)}")


def rollback(
    release: Annotated[str | None, typer.Argument(help="Which one; without it, the one before the live one.")] = None,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Make an earlier release live again; readers that have the present one open keep it."""
    with exit_codes():
        record = Catalogue(site_of(load_settings(settings, override or ()))).rollback(release)
        console.print(f"release {record.release} is live again: {record.num_items:,} items, {_quality(record.quality)}")


def releases(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """List all releases: when, which vector space, how good, what keeps them, how large."""
    with exit_codes():
        loaded = load_settings(settings, override or ())
        catalogue = Catalogue(site_of(loaded))
        found, problems = catalogue.releases(loaded.resources.releases.clock_skew_seconds)
        if as_json:
            print(json.dumps({"releases": [asdict(listed) for listed in found], "problems": problems}, indent=1))
            return
        table = Table(
            "release", "published", "space", "quality", "state", "items", "bytes", title=catalogue.storage.url
        )
        for column in (5, 6):
            table.columns[column].justify = "right"
        for listed in found:
            record = listed.record
            when = datetime.datetime.fromtimestamp(record.created_at).strftime("%Y-%m-%d %H:%M:%S")
            table.add_row(
                record.release, when, record.space_id[:12], _quality(record.quality), _state(listed),
                f"{record.num_items:,}", f"{record.num_bytes:,}",
            )  # fmt: skip
        console.print(table)
        for problem in problems:
            console.print(f"[bold red]broken:[/] {escape(problem)}", soft_wrap=True)


def pin(
    release: ReleaseArgument,
    reason: Annotated[str, typer.Option(help="Why, for whoever finds it.")] = "",
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Keep a release from `pinsage gc`, whatever its age."""
    with exit_codes():
        Catalogue(site_of(load_settings(settings, override or ()))).pin(release, reason)
        console.print(f"release {release} is pinned")


def unpin(release: ReleaseArgument, settings: SettingsOption = "pinsage.yaml", override: OverrideOption = None) -> None:
    """Let a release go when it is old."""
    with exit_codes():
        Catalogue(site_of(load_settings(settings, override or ()))).unpin(release)
        console.print(f"release {release} is not pinned any more")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Delete old releases and runs, by resources.releases; none that is live, pinned, held or led back to."""
    with exit_codes():
        loaded = load_settings(settings, override or ())
        catalogue, kept = Catalogue(site_of(loaded)), loaded.resources.releases
        keep: tuple[str, ...] = ()
        if loaded.resources.run.startswith(f"{site_of(loaded).rstrip('/')}/"):
            keep = (catalogue.id_of(loaded.resources.run),)
        arguments = (catalogue, kept.keep_count, kept.keep_days, kept.clock_skew_seconds, keep)
        plan = make_plan(*arguments)[0] if dry_run else collect(*arguments)
        verb = "would delete" if dry_run else "deleted"
        for kind, going in (("release", plan.releases), ("run", plan.runs)):
            for name, size in going.items():
                console.print(f"{verb} {kind} {name}: {size:,} bytes", soft_wrap=True)
        for name, why in plan.kept.items():
            console.print(f"kept {escape(name)}: {escape(why)}", soft_wrap=True)
        total = sum(plan.releases.values()) + sum(plan.runs.values())
        console.print(f"{verb} {len(plan.releases)} releases and {len(plan.runs)} other runs: {total:,} bytes")


COMMANDS: dict[str, Callable[..., None]] = {
    "publish": publish, "rollback": rollback, "releases": releases, "pin": pin, "unpin": unpin, "gc": gc,
}  # fmt: skip


def _quality(quality: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', '-').replace('mrr', 'MRR')} {value:.3f}" for name, value in quality.items())


def _state(listed: Listed) -> str:
    flags = {
        "live": listed.live, "previous": listed.previous, "withdrawn": listed.withdrawn, "pinned": listed.pinned,
        "being deleted": listed.collecting, f"leased by {len(listed.leases)}": bool(listed.leases),
    }  # fmt: skip
    return ", ".join(name for name, holds in flags.items() if holds)
