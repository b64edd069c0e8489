"""The `pinsage` command: every stage, run, nightly, status, query, releases, gate, init, plan, settings, the demo."""

from __future__ import annotations

import jobs.interrupts  # noqa: F401

# isort: split
import datetime
import json
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs import nightly, releases
from jobs.gate import gate_command
from jobs.plan import PANEL, plan_command
from jobs.releases import ReleaseOption
from jobs.stage import ForceOption, OverrideOption, SettingsOption, exit_codes, lineage_of, run_stages, stage_command
from pipeline import report
from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, load_settings, reference
from pipeline.contracts.datasets import RECEIPTS, code_version, find_manifest, open_manifest, read_file
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.storage import Storage

VERSIONS = ("pyspark", "torch", "dgl", "faiss-cpu", "faiss-gpu", "pyarrow", "numpy", "numba", "fsspec", "s3fs")
DEMO = Path(__file__).resolve().parent.parent / "infra" / "settings" / "online-retail.yaml"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""PinSage in production: interactions and item content in, an embedding for every item and a tested
    nearest-neighbour index out.

    Start with `pinsage init interactions.parquet --items items.parquet`, read the settings file it writes, then
    `pinsage run -s pinsage.yaml`. An interrupted command goes on where it was when you type it again.""",
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Entry point of the `pinsage` command."""
    app()


def _print_versions(wanted: bool) -> None:
    if wanted:
        print(
            f"pinsage {code_version()} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"
        )
        for name in VERSIONS:
            with suppress(metadata.PackageNotFoundError):
                print(f"{name} {metadata.version(name)}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print what is installed, and exit."),
    ] = False,
) -> None:
    """Options before any command; the help is the app's."""


for _stage in schemas.STAGES:
    app.command(_stage.name, rich_help_panel="Stages, in order")(stage_command(_stage))
app.command("plan", rich_help_panel=PANEL)(plan_command)
for _name, _command in releases.COMMANDS.items():
    app.command(_name, rich_help_panel=releases.PANEL)(_command)
app.add_typer(nightly.app, name="nightly", rich_help_panel="The whole pipeline")
app.command("gate", rich_help_panel=releases.PANEL)(gate_command)


@app.command(rich_help_panel="The whole pipeline")
def run(settings: SettingsOption = "pinsage.yaml", override: OverrideOption = None, force: ForceOption = False) -> None:
    """Run every stage in order, skipping what is up to date, and print how good the result is."""
    with exit_codes():
        loaded = load_settings(settings, override or ())
        run_stages(schemas.STAGES, loaded, force=force)
        show_results(loaded)


@app.command(rich_help_panel="The whole pipeline")
def demo(override: OverrideOption = None) -> None:
    """Run the pipeline on the bundled Online Retail data: a real shop's two years of invoices."""
    with exit_codes():
        loaded = load_settings(str(DEMO), override or ())
        run_stages(schemas.STAGES, loaded)
        show_results(loaded)
        settings = DEMO.relative_to(Path.cwd()) if DEMO.is_relative_to(Path.cwd()) else DEMO
        console.print(f"\nNext: .venv/bin/pinsage query 85123A --settings {settings}")


@app.command(rich_help_panel="Looking at a run")
def status(settings: SettingsOption = "pinsage.yaml", override: OverrideOption = None) -> None:
    """Show every dataset of the run: state, rows, bytes, when it was made and by which settings."""
    with exit_codes():
        loaded = load_settings(settings, override or ())
        storage = Storage(loaded.resources.run)
        table = Table(
            "stage", "dataset", "state", "rows", "bytes", "made", "settings", title=storage.url, title_style="bold"
        )
        for column in (3, 4):
            table.columns[column].justify = "right"
        for stage in schemas.STAGES:
            wanted = _fingerprint(storage, stage, loaded)
            for dataset in stage.writes:
                table.add_row(
                    stage.name if dataset is stage.writes[0] else "", dataset.name, *_state(storage, dataset, wanted)
                )
        console.print(table)
        console.print(
            "ready: made from the present settings and inputs; changed: from others, the next run builds it again;\n"
            "building: interrupted, the next run goes on; missing: never made. "
            "settings: the fingerprint of all it depends on."
        )


@app.command(rich_help_panel="Looking at a run")
def query(
    item_key: Annotated[str, typer.Argument(help="The item's key, as in your data.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many neighbours.")] = 10,
    release: ReleaseOption = None,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Print the nearest neighbours of an item, with scores and titles."""
    with exit_codes(), releases.opened(load_settings(settings, override or ()), release) as (loaded, found):
        index = releases.open_index(loaded, found)
        keys, scores = index.neighbours(item_key, k)
        own, *titles = index.titles([item_key, *keys])
        heading = report.plain(f"{item_key}  {own}")
        table = Table("", "score", "key", "title", title=heading, title_style="bold")
        for place, (key, score, name) in enumerate(zip(keys, scores, titles, strict=True), 1):
            table.add_row(str(place), f"{score:.3f}", report.plain(key), report.plain(name))
        console.print(table)


@app.command(rich_help_panel="Looking at a run")
def embed(
    items: Annotated[str, typer.Argument(help="Items: a file like those of task.data.items.")],
    interactions: Annotated[
        str | None, typer.Option(help="Who touched them: a file with the user and item columns of your interactions.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A Parquet file to write; without it, JSON lines are printed.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=0, help="Also the keys of this many nearest items of the catalogue.")] = 0,
    release: ReleaseOption = None,
    settings: SettingsOption = "pinsage.yaml",
    override: OverrideOption = None,
) -> None:
    """Embed items that are not in the catalogue yet, from content and a few interactions; needs no Spark."""
    with exit_codes(), releases.opened(load_settings(settings, override or ()), release) as (loaded, found):
        from jobs.embed import embed_files

        index = releases.open_index(loaded, found) if k else None
        embed_files(loaded, items, interactions, output, index, k)


@app.command(rich_help_panel="Setting up")
def init(
    data: Annotated[str, typer.Argument(help="Interactions: a Parquet, CSV or JSON-lines file.")],
    items: Annotated[str | None, typer.Option(help="Item content: a file of the same kinds.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the settings.")] = Path("pinsage.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Look at your files and write a commented settings file with guesses to check."""
    with exit_codes():
        from pipeline.guess import guess_settings

        if output.exists() and not force:
            raise SettingsError(f"{output} exists; give --output another name, or --force to write over it")
        text = guess_settings(data, items)
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"cannot write {output}: {error.strerror}; give --output another place") from None
        console.print(f"wrote {output}: check its guesses, then\n  pinsage run --settings {output}")


@app.command("settings", rich_help_panel="Setting up")
def settings_reference(
    search: Annotated[str, typer.Argument(help="Only names and descriptions with this text.")] = "",
) -> None:
    """Print every setting: name, type, default and what it is for."""
    for name, kind, default, meaning in reference():
        if search.lower() in f"{name} {meaning}".lower():
            stated = default if default == "required" else f"default {default}"
            console.print(f"[bold]{name}[/]  [dim]{escape(f'{kind}, {stated}')}[/]", soft_wrap=True)
            if meaning:
                console.print(f"    {escape(meaning)}", soft_wrap=True)


def show_results(settings: Settings) -> None:
    """The evaluation table, some items' neighbours, and where the report lies."""
    storage = Storage(settings.resources.run)
    metrics = json.loads(read_file(storage, open_manifest(storage, schemas.EVALUATION), "metrics.json"))
    console.print()
    for part in report.terminal(metrics):
        console.print(part)
    console.print(f"\nreport: {storage.locate(f'{schemas.EVALUATION.name}/report.html')}", soft_wrap=True)


def _fingerprint(storage: Storage, stage: schemas.Stage, settings: Settings) -> str | None:
    """What the stage's outputs should be made from now; None while an input is missing."""
    try:
        return lineage_of(storage, stage, settings).fingerprint
    except DataError:
        return None


def _state(storage: Storage, dataset: schemas.Dataset, wanted: str | None) -> tuple[str, str, str, str, str]:
    manifest = find_manifest(storage, dataset)
    if manifest is None:
        state = "[yellow]building[/]" if storage.names(f"{dataset.name}/{RECEIPTS}") else "[red]missing[/]"
        return state, "", "", "", ""
    found = manifest.lineage.fingerprint
    made = datetime.datetime.fromtimestamp(manifest.created_at).strftime("%m-%d %H:%M:%S")
    state = "[green]ready[/]" if found == wanted else "[yellow]changed[/]"
    return state, f"{manifest.num_rows:,}", f"{manifest.num_bytes:,}", made, found[:10]


if __name__ == "__main__":
    main()
