"""The `pinsage` command from raw files to neighbours: what runs, what is skipped, and what a person reads."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.interrupts import held_back
from jobs.stage import exit_codes
from pipeline.contracts import schemas
from pipeline.contracts.config import reference
from pipeline.contracts.schemas import STAGES
from pipeline.contracts.storage import Storage
from pipeline.nightly import lock
from tests.jobs.conftest import Shop
from tests.runs import ROOT

STAGE_NAMES = [stage.name for stage in STAGES]


def plain(text: str) -> str:
    """What was printed, without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│┃╭╮╰╯─━┏┓┡┩└┘┳╇┴]", " ", text).split())


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return plain(result.output)


def states(shop: Shop) -> dict[str, str]:
    """Every dataset's state, as `pinsage status` says it."""
    outcome = shop.pinsage("status")
    assert outcome.exit_code == 0, outcome.text
    return dict(re.findall(r"(\w+) (ready|changed|building|missing) ", plain(outcome.text)))


# ------------------------------------------------------------------------------------------------ help


def test_help_lists_the_stages_in_order_and_where_to_start() -> None:
    text = printed("--help")
    listed = text[text.index("Stages, in order") :]
    places = [listed.index(f" {name} ") for name in STAGE_NAMES]
    assert places == sorted(places)
    assert "pinsage init interactions.parquet" in text


@pytest.mark.parametrize("stage", STAGES, ids=STAGE_NAMES)
def test_the_help_of_a_stage_says_what_it_reads_and_writes(stage: schemas.Stage) -> None:
    text = printed(stage.name, "--help")
    reads = ", ".join(dataset.name for dataset in stage.reads) or "your files"
    writes = ", ".join(dataset.name for dataset in stage.writes)
    assert f"Reads {reads}; writes {writes}." in text
    assert stage.meaning[1:] in text
    assert "--set" in text
    assert "--force" in text


def test_a_command_starts_without_what_only_stages_need() -> None:
    """They take longer to import than all else, and Spark can start meanwhile."""
    heavy = ("numba", "scipy", "sklearn", "pandas", "torch", "faiss")
    code = f"import sys, jobs.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["run", "status", "query", "embed", "plan", "init", "settings", "demo"])
def test_every_other_command_has_a_help(command: str) -> None:
    assert f"Usage: root {command}" in printed(command, "--help")


def test_the_settings_command_prints_every_setting_and_can_search() -> None:
    text = printed("settings")
    assert not [name for name, _, _, _ in reference() if name not in text]
    found = printed("settings", "margin")
    assert "task.training.margin float, default 0.1" in found
    assert "task.walks.num_walks" not in found


def test_a_command_that_does_not_exist_is_refused() -> None:
    assert CliRunner().invoke(app, ["wakls"]).exit_code == 2


# ------------------------------------------------------------------------------------------------ status


def test_before_anything_ran_all_is_missing(new_shop: Shop) -> None:
    assert states(new_shop) == {dataset.name: "missing" for stage in STAGES for dataset in stage.writes}
    assert not new_shop.run.exists(), "looking changes nothing"


def test_status_tells_what_is_ready_and_what_is_missing(shop: Shop) -> None:
    found = states(shop)
    made = {dataset.name for stage in (schemas.INGEST, schemas.GRAPH) for dataset in stage.writes}
    assert {name for name, state in found.items() if state == "ready"} == made
    assert {name for name, state in found.items() if state == "missing"} == {
        dataset.name for stage in STAGES[2:] for dataset in stage.writes
    }


def test_status_tells_what_was_made_by_other_settings_and_what_is_half_built(shop: Shop) -> None:
    shop.configure(lambda tree: tree["task"].update(graph={"max_user_degree": 3}))
    (shop.run / "neighbours" / "_building").mkdir(parents=True)
    (shop.run / "neighbours" / "_building" / "part-00000.parquet.json").write_text("{}")
    found = states(shop)
    assert (found["items"], found["item_users"], found["user_items"]) == ("ready", "changed", "changed")
    assert found["neighbours"] == "building"


def test_a_moved_run_is_still_up_to_date(shop: Shop, tmp_path: Path) -> None:
    """The fixture's shop is a copy, with time stamps kept, of one that was run elsewhere."""
    outcome = shop.pinsage("ingest")
    assert outcome.text == "ingest: up to date\n"


# ------------------------------------------------------------------------------------------------ the whole


@pytest.mark.slow
def test_after_a_run_every_dataset_is_ready(finished: Shop) -> None:
    assert states(finished) == {dataset.name: "ready" for stage in STAGES for dataset in stage.writes}


@pytest.mark.slow
def test_a_second_run_skips_everything_and_shows_the_results_again(finished: Shop) -> None:
    outcome = finished.pinsage("run")
    assert outcome.exit_code == 0, outcome.text
    assert outcome.text.startswith("".join(f"{name}: up to date\n" for name in STAGE_NAMES))
    assert "done in" not in outcome.text
    assert f"report: {finished.run}/evaluation/report.html" in outcome.text


@pytest.mark.slow
def test_query_prints_the_neighbours_with_titles(finished: Shop) -> None:
    outcome = finished.pinsage("query", "g2-03", "-k", "4")
    assert outcome.exit_code == 0, outcome.text
    text = plain(outcome.text)
    assert "g2-03 green rug" not in text.split("score")[1], "an item is not its own neighbour"
    assert len(re.findall(r"\d -?\d\.\d{3} (?:g\d-\d\d|lonely) ", text)) == 4


@pytest.mark.slow
def test_query_of_an_unknown_key_names_the_nearest(finished: Shop) -> None:
    outcome = finished.pinsage("query", "g2-3")
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.text
    assert "g2-3" in outcome.text
    assert "g2-03" in outcome.text


@pytest.mark.slow
def test_one_setting_rebuilds_only_what_depends_on_it(finished: Shop, tmp_path: Path) -> None:
    """Another number of queries changes the index and what reads it; another margin the model and all after it."""
    shop = finished.copy(tmp_path / "shop")

    def ran(*changes: str) -> list[str]:
        overrides = [word for change in changes for word in ("--set", change)]
        outcome = shop.pinsage("run", *overrides)
        assert outcome.exit_code == 0, outcome.text
        return re.findall(r"^(\w+): done in", outcome.text, re.MULTILINE)

    assert ran("task.index.num_queries=10") == ["index", "evaluation"]
    later = ["train", "inference", "compact", "index", "evaluation"]
    assert ran("task.index.num_queries=10", "task.training.margin=0.2") == later


@pytest.mark.slow
def test_what_nothing_changed_for_is_not_rebuilt_after_an_input_was_built_again(finished: Shop) -> None:
    """Forcing walks gives the same bytes, so nothing after them is out of date."""
    assert "walks: done in" in finished.pinsage("walks", "--force").text
    assert set(states(finished).values()) == {"ready"}


def test_the_version_is_told_with_those_of_what_it_runs_on() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    first, *others = done.output.splitlines()
    assert first.startswith(f"pinsage {metadata.version('pinsage-pipeline')} on Python 3.")
    assert f"torch {metadata.version('torch')}" in others


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    """Any other error keeps its own."""
    cases = {
        "raise KeyboardInterrupt": "",
        "try: raise KeyboardInterrupt\nexcept BaseException: raise ImportError": "",
        "raise ValueError": "Traceback",
    }
    for code, expected in cases.items():
        done = subprocess.run(
            [sys.executable, "-c", f"import jobs.interrupts\n{code}"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode != 0
        assert done.stderr[:9] == expected


def test_an_interrupt_that_we_sent_ourselves_is_told_by_what_it_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A night whose lock was taken by another must not be told to go on."""

    def night() -> None:
        with exit_codes(), lock.hold(Storage(str(tmp_path)), "2011-03-05", "runs/2011-03-05") as held:
            held.lost = "lock.json was taken over by another night"
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        night()
    assert ended.value.code == 1
    assert "error: lock.json was taken over by another night" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_before_python_has_begun_leaves_no_traceback_where_it_is_held_back() -> None:
    for _ in range(5):
        with held_back():
            process = subprocess.Popen(
                [sys.executable, "-c", "import jobs.interrupts, time; time.sleep(60)"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, output) == (-signal.SIGINT, b"")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
