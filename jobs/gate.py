"""`pinsage gate`: may this run be released? Exit code 0 passed (or forced), 3 refused, 1 it could not be judged.

    pinsage gate --settings FILE --against s3://bucket/runs/2011-03-04 --history s3://bucket/nights

`gate/verdict.json` in the run's folder says all that the table says, for programs.
"""

from __future__ import annotations

import datetime
import getpass
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.stage import OverrideOption, SettingsOption, exit_codes, spark_session
from pipeline.contracts.config import load_settings
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.storage import Storage
from pipeline.nightly.night import checked_date
from pipeline.nightly.summary import NIGHTS
from pipeline.releases.catalogue import Catalogue
from pipeline.releases.records import RUNS
from pipeline.session import launch

if TYPE_CHECKING:
    from pipeline.gate.stage import Force

REFUSED = 3
"""Exit code of a refusal: what was asked was answered, and the answer is no."""
_STYLES = {"block": "bold red", "warn": "yellow", "pass": "green", "skip": "dim"}


def gate_command(
    against: Annotated[
        str | None,
        typer.Option(help="Folder of the run to compare with. Default: the site's live release, if there is one."),
    ] = None,
    history: Annotated[
        str | None,
        typer.Option(help="Folder of earlier nights' summaries, one NIGHT.json each. Default: nights/ of the site."),
    ] = None,
    night: Annotated[
        str | None, typer.Option(help="Date of tonight's data. Default: the run's name if it is one, else today.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Exit with 0 even if refused; the verdict keeps it.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why it is forced; needed with --force.")] = None,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Judge a finished run against the live release: quality, index, vectors, data. Writes gate/verdict.json."""
    with exit_codes():
        forced, loaded = force_of(force, reason), load_settings(settings, override or ())
        launch(loaded.resources.spark)
        from pipeline.gate.stage import judge

        site = loaded.resources.site
        if site is not None:
            home, released = site.rstrip("/"), Catalogue(site).kept_pointer().release
            against = against or (None if released is None else f"{home}/{RUNS}/{released}")
            history = history or f"{home}/{NIGHTS}"
        live, past = None if against is None else Storage(against), [] if history is None else read_history(history)
        date = None if night is None else datetime.date.fromisoformat(checked_date(night))
        with spark_session(loaded) as spark:
            verdict = judge(spark, Storage(loaded.resources.run), loaded, live, past, date, forced)
        print_verdict(verdict)
        if verdict["verdict"] != "passed" and not verdict["forced"]:
            raise SystemExit(REFUSED)


def read_history(url: str) -> list[dict[str, Any]]:
    """Summaries of nights in a folder, by date: NIGHT.json holds what measure_data gave, alone or as `tonight`."""
    storage, found = Storage(url), []
    for name in storage.names(""):
        if name.endswith(".json"):
            try:
                tree = storage.read_with(name, json.loads)
                if tree.get("status", "published") != "published":
                    continue
                tree = tree.get("tonight") or tree
                found.append({**tree, "night": tree.get("night") or name.removesuffix(".json")})
            except (ValueError, AttributeError) as error:
                raise DataError(f"{storage.locate(name)} is no night's summary ({error}); take it away") from None
    return sorted(found, key=lambda tree: str(tree["night"]))


def force_of(force: bool, reason: str | None) -> Force | None:
    """Who lets a refused run through, and why. Raises SettingsError for a force without a reason."""
    if not force:
        return None
    if not (reason or "").strip():
        raise SettingsError("--force needs --reason TEXT: it is kept in the verdict for whoever asks later")
    from pipeline.gate.stage import Force

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = "unknown"
    return Force(user, reason or "")


def print_verdict(verdict: Mapping[str, Any]) -> None:
    """One line per check, blocked ones first, and what follows from them."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    against = f" against {verdict['live']}" if verdict["live"] else ", the first release"
    table = Table(
        "", "check", "value", "bound", "what was found", title=escape(f"{verdict['run']}{against}"), title_style="bold"
    )
    for column in (2, 3):
        table.columns[column].justify = "right"
    for check in verdict["checks"]:
        numbers = ("" if check[name] is None else f"{check[name]:.4g}" for name in ("value", "bound"))
        grade = f"[{_STYLES[check['verdict']]}]{check['verdict']}[/]"
        table.add_row(grade, check["name"], *numbers, escape(check["reason"]))
    console.print(table)
    blocked = [check["name"] for check in verdict["checks"] if check["verdict"] == "block"]
    if not blocked:
        console.print("[bold green]passed[/]: this run may be released")
        return
    console.print(f"[bold red]refused[/] because of {', '.join(blocked)}: the live release stays", soft_wrap=True)
    if verdict["forced"]:
        forced = verdict["forced"]
        console.print(f"[yellow]forced[/] by {escape(forced['by'])}: {escape(forced['reason'])}", soft_wrap=True)
