"""What a night does: which files it reads, what it goes on from, whether it trains. Decided once, then kept.

`runs/<name>/night.json` has the decision, so that a night that was interrupted goes on with the same one, and
`runs/<name>/settings.yaml` the settings that follow from it, which every stage's job is given.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.contracts import schemas
from pipeline.contracts.config import Settings, dump_settings, select
from pipeline.contracts.errors import DataError, SettingsError
from pipeline.contracts.storage import Storage, describe_inputs
from pipeline.releases.records import RUNS

RECORD = "night.json"
Plan = Literal["scratch", "warm", "reuse"]
_OF_THE_MODEL = (*schemas.TRAIN.settings, *schemas.FEATURES_STAGE.settings)
"""Settings that the model of an earlier night must share."""


@dataclass(frozen=True)
class Night:
    """A night's decision.

    previous is the name of the run that it goes on from; since_training and since_scratch count nights since the model
    was trained, and from random weights: 0 if tonight. inputs are all files that the run's interactions and items are
    from, as `describe_inputs` tells of them; appended those that are read tonight, maybe none, if the rest is
    previous's.
    """

    night: str
    run: str
    previous: str | None
    training: Plan
    reason: str
    since_training: int
    since_scratch: int
    inputs: dict[str, list[dict[str, Any]]]
    settings: str
    appended: list[str] | None = None

    @property
    def fingerprint(self) -> str:
        """Of the files and settings: a night of the same has nothing new to say."""
        return _digest([self.inputs, self.settings])


def checked_date(text: str | None) -> str:
    """The night's name: a date, today's (UTC) if none is given. Raises SettingsError for what is none."""
    if text is None:
        return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise SettingsError(f"--night is {text!r}, expected a date such as 2011-03-05") from None


def snapshot(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """The user's files as they are now. Raises DataError for a path that names nothing."""
    data, found = settings.task.data, {}
    for name, source in (("interactions", data.interactions), ("items", data.items)):
        found[name] = [file for path in (() if source is None else source.paths) for file in _files(path, name)]
    return found


def _files(path: str, name: str) -> list[dict[str, Any]]:
    try:
        return describe_inputs(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct task.data.{name}.paths") from None


def decide(
    settings: Settings, night: str, run: str, live: str | None, before: Night | None,
    inputs: dict[str, list[dict[str, Any]]],
) -> Night:  # fmt: skip
    """What tonight does on top of the live release's run (None: there is none), which the night before made.

    before is None where that run was not made by a night: its ids are kept, and nobody knows how old its model is.
    """
    model, whole = (_digest(select(settings, names)) for names in (_OF_THE_MODEL, ("task",)))
    plan, reason = _plan(settings, model, live, before)
    since_training = 0 if plan != "reuse" or before is None else before.since_training + 1
    since_scratch = 0 if plan == "scratch" or before is None else before.since_scratch + 1
    read, appended = inputs["interactions"], None
    if before is not None and settings.task.nightly.append and settings.task.split.kind != "random":
        read, appended = _added(before.inputs["interactions"], read)
    return Night(
        night, run, live, plan, reason, since_training, since_scratch, {**inputs, "interactions": read},
        f"{model}:{whole}", appended,
    )  # fmt: skip


def _added(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str] | None]:
    """All files of both, and which of them are new; None, and only those of now, where all are to be read anew.

    That is where one was changed, or where all are as they were. Raises DataError where one was changed and another is
    gone, whose events are only in the interactions of before.
    """
    known, there = {file["url"]: file for file in before}, {file["url"] for file in now}
    new = [file for file in now if file["url"] not in known]
    changed = [file["url"] for file in now if known.get(file["url"], file) != file]
    gone = [url for url in known if url not in there]
    if changed and gone:
        raise DataError(
            f"{changed[0]} was changed since it was read, and {gone[0]} is gone, as {len(gone)} of {len(known)} files "
            "are: reading all anew would lose the events of what is gone; bring it back, or set task.nightly.append: "
            "false to go on without"
        )
    if changed or not (new or gone):
        return now, None
    return [*before, *new], [file["url"] for file in new]


def _plan(settings: Settings, model: str, live: str | None, before: Night | None) -> tuple[Plan, str]:
    nightly = settings.task.nightly
    if before is None:
        return "scratch", "there is no live release" if live is None else f"the live release {live} is no night's"
    if before.settings.partition(":")[0] != model:
        return "scratch", "settings of the features or the model changed since the live release"
    if before.since_scratch + 1 >= nightly.scratch_every:
        return "scratch", f"the last training from random weights was {before.since_scratch + 1} nights ago"
    if before.since_training + 1 >= nightly.train_every:
        return "warm", f"the last training was {before.since_training + 1} nights ago"
    return "reuse", f"the model is {before.since_training + 1} of {nightly.train_every} nights old"


def _digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def settings_of(night: Night, settings: Settings, site: str) -> Settings:
    """The settings of the night's run: the files of its snapshot, and what it goes on from."""
    tree = settings.model_dump(mode="json")
    task, resources = tree["task"], tree["resources"]
    here = f"{site.rstrip('/')}/{RUNS}"
    resources["run"] = f"{here}/{night.run}"
    resources["inference"]["keep_layers"] = True
    for name in ("interactions", "items"):
        if task["data"][name] is not None:
            task["data"][name]["paths"] = [file["url"] for file in night.inputs[name]]
    if night.appended is not None:
        task["data"]["interactions"]["paths"] = night.appended
    task["data"]["append"] = night.appended is not None
    earlier = None if night.previous is None else f"{here}/{night.previous}"
    task["data"]["previous"] = earlier
    for part in ("features", "training"):
        task[part]["previous"] = None if night.training == "scratch" else earlier
    if night.training != "scratch":
        task["training"]["epochs"] = settings.task.nightly.warm_epochs if night.training == "warm" else 0
    return Settings.model_validate(tree)


def write(site: Storage, night: Night, settings: Settings) -> str:
    """Keep the decision, and then the settings that follow from it; returns their URL."""
    folder = f"{RUNS}/{night.run}"
    site.write_bytes(f"{folder}/{RECORD}", json.dumps(asdict(night), indent=1).encode())
    site.write_bytes(f"{folder}/{schemas.RESOLVED}", dump_settings(settings).encode())
    return f"{site.url.rstrip('/')}/{folder}/{schemas.RESOLVED}"


def read(site: Storage, run: str) -> Night | None:
    """The decision of a run; None for a run that no night made. Raises DataError for one that cannot be read."""
    path = f"{RUNS}/{run}/{RECORD}"
    try:
        return Night(**site.read_with(path, json.loads))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{site.locate(path)} is no night's record ({error}); delete that run's folder") from None


def attempts(site: Storage, night: str) -> list[str]:
    """Names of the night's runs, oldest first: `2011-03-05`, `2011-03-05-2`, ..."""
    names = [name for name in site.names(RUNS) if name == night or name.startswith(f"{night}-")]
    numbered = [(_number(name, night), name) for name in names]
    return [name for number, name in sorted(numbered) if number]


def _number(name: str, night: str) -> int:
    rest = name[len(night) + 1 :]
    return 1 if name == night else int(rest) if rest.isdecimal() else 0


def next_attempt(names: Sequence[str], night: str) -> str:
    """The name of one more run of the night."""
    return night if not names else f"{night}-{_number(names[-1], night) + 1}"
