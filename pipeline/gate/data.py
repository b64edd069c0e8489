"""What the gate asks of tonight's data: how much came, how new it is, what repeats, what is gone.

Ingest leaves the counts in INTERACTIONS' manifest, by day; here they are only compared. A night's summary, which
`measure_data` makes, is what later nights are given as history, a dict of:

night       its date, 2011-03-05                 rows        interactions in the run
first       time of the oldest event, s          newest      time of the newest, s
volume      events that the live release lacked  usual       what was to be expected, None if unknown
span_days   days since the night before          basket      events of a user and day among the new ones
repeats     repeated events among the new ones   quarantined share of the newly read rows
items       items of tonight's input             mrr         PinSage's, item to item; None without an evaluation

Where timestamps are only an order, what needs a clock is None.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.contracts.config import Gate
from pipeline.contracts.datasets import Manifest
from pipeline.gate.checks import Check, at_least, at_most, skip

DAY = 86_400
EPOCH = datetime.date(1970, 1, 1)
FEW = 20
"""Fewer events, or users, are too few to know a day again or to have an average."""
FEWEST_WEEKS = 3


@dataclass(frozen=True)
class Day:
    """One day's events, users, repeated events, and the digest of what was touched at which second."""

    events: int = 0
    users: int = 0
    repeats: int = 0
    digest: int = 0

    def since(self, before: Day) -> Day:
        """What came to the day."""
        return Day(
            max(0, self.events - before.events), max(0, self.users - before.users),
            max(0, self.repeats - before.repeats), (self.digest - before.digest) % 2**64,
        )  # fmt: skip


@dataclass(frozen=True)
class Input:
    """What a run was made from; days are None where timestamps have no clock. present is items of the input."""

    rows: int
    read: int
    bad: int
    first: int
    newest: int
    present: int
    days: Mapping[int, Day] | None

    @classmethod
    def of(cls, interactions: Manifest, items: Manifest) -> Input:
        """From the manifests of a run."""
        said, days = interactions.metadata, None
        if "days" in said:
            rows = said["days"]["rows"]
            days = {day: Day(events, users, again, int(digest, 16)) for day, events, users, again, digest in rows}
        present = items.metadata.get("present", items.num_rows)
        return cls(
            interactions.num_rows, said["read"], said["bad"], said.get("first", 0), said.get("last", 0), present, days
        )


def day_number(date: datetime.date) -> int:
    """Days since 1970."""
    return (date - EPOCH).days


def date_of(day: int) -> datetime.date:
    """The other way round."""
    return EPOCH + datetime.timedelta(days=day)


def is_quiet(settings: Gate) -> Callable[[int], bool]:
    """Whether a day lies in task.gate.quiet_days."""

    def inside(date: str, first: str, last: str) -> bool:
        here = date[-len(first) :]
        return first <= here <= last if first <= last else here >= first or here <= last

    spans = [(first, last or first) for first, _, last in (text.partition("..") for text in settings.quiet_days)]
    return lambda day: any(inside(date_of(day).isoformat(), *span) for span in spans)


# ------------------------------------------------------------------------------------------------ measuring


def measure_data(
    tonight: Input, live: Input | None, night: datetime.date, before: datetime.date | None, settings: Gate
) -> dict[str, Any]:
    """Tonight's summary; before is the date of the last night, or of the live release if there was none since."""
    found: dict[str, Any] = {
        "night": night.isoformat(), "rows": tonight.rows, "items": tonight.present,
        "quarantined": _newly_bad(tonight, live), "volume": None if live is None else tonight.rows - live.rows,
        **dict.fromkeys(("first", "newest", "usual", "span_days", "basket", "usual_basket", "repeats")),
    }  # fmt: skip
    if tonight.days is None:
        return found
    found |= {"first": tonight.first, "newest": tonight.newest}
    if live is None or live.days is None or before is None:
        return found
    new = new_days(tonight.days, live.days)
    found |= {"volume": sum(day.events for day in new.values()), "repeats": sum(day.repeats for day in new.values())}
    return found | measure_volume(tonight.days, day_number(before), day_number(night), settings)


def new_days(tonight: Mapping[int, Day], live: Mapping[int, Day]) -> dict[int, Day]:
    """By day, what tonight has and the live release had not; of days that both tell of."""
    since = max(min(tonight, default=0), min(live, default=0))
    grown = {day: now.since(live.get(day, Day())) for day, now in tonight.items() if day >= since}
    return {day: more for day, more in grown.items() if more.events}


def measure_volume(days: Mapping[int, Day], before: int, night: int, settings: Gate) -> dict[str, Any]:
    """Events of the days after before, up to the night's, and what is usual: the median of the same weekdays."""
    quiet, known = is_quiet(settings), min(days, default=0)
    usual, counted = 0.0, []
    for day in range(before + 1, night + 1):
        lags = [day - 7 * (weeks + -(-(night - before) // 7)) for weeks in range(settings.nights)]
        past = [days.get(lag, Day()).events for lag in lags if lag >= known and not quiet(lag)]
        if not quiet(day) and len(past) >= FEWEST_WEEKS:
            usual += float(np.median(past))
            counted.append(days.get(day, Day()))
    spans = [
        [days[day] for day in range(stop - (night - before) + 1, stop + 1) if day in days and not quiet(day)]
        for stop in range(before, before - 7 * settings.nights, min(-1, before - night))
    ]
    baskets = [basket for span in spans if (basket := _basket(span)) is not None]
    return {
        "span_days": night - before, "usual": usual if counted else None,
        "events_of_usual_days": sum(day.events for day in counted),
        "basket": _basket(counted), "usual_basket": float(np.median(baskets)) if baskets else None,
        "least_basket": min(baskets, default=None),
    }  # fmt: skip


def _basket(days: Sequence[Day]) -> float | None:
    users = sum(day.users for day in days)
    return None if users < FEW else sum(day.events for day in days) / users


def _newly_bad(tonight: Input, live: Input | None) -> float:
    if live is None or tonight.read <= live.read:
        return tonight.bad / max(1, tonight.read)
    return max(0, tonight.bad - live.bad) / (tonight.read - live.read)


# ------------------------------------------------------------------------------------------------ checks


def check_data(
    tonight: Input, live: Input | None, measured: Mapping[str, Any], history: Sequence[Mapping[str, Any]],
    settings: Gate,
) -> list[Check]:  # fmt: skip
    """All checks of the data; measured is tonight's summary, history those of earlier nights, the latest last."""
    night = day_number(datetime.date.fromisoformat(measured["night"]))
    found = [
        *check_volume(measured, history, settings),
        *check_newest(tonight.newest if tonight.days is not None else None, night, settings),
    ]
    if live is not None:
        found += [
            check_lost(tonight, live, settings), check_repeats(tonight, live, measured, settings),
            check_copied_days(tonight.days, live.days),
            at_least(
                "catalogue", tonight.present / max(1, live.present), settings.min_catalogue,
                f"{tonight.present:,} items, live {live.present:,}",
                "items are gone from the input; is the items file whole?",
            ),
        ]  # fmt: skip
    share = measured["quarantined"]
    found.append(
        at_most(
            "quarantined", share, settings.max_quarantined, f"{share:.2%} of the new rows are bad",
            "look at the reasons in the run's quarantine and mend the export", settings.max_quarantined / 2,
        )
    )  # fmt: skip
    return found


def check_volume(measured: Mapping[str, Any], history: Sequence[Mapping[str, Any]], settings: Gate) -> list[Check]:
    """How much came, against what is usual: by weekday where there is a clock, else the median of earlier nights."""
    if measured["volume"] is None:
        return [skip("volume", "no live release to count from")]
    usual, came = measured["usual"], measured.get("events_of_usual_days", measured["volume"])
    words = f"the same weekdays of {settings.nights} weeks"
    if measured["newest"] is None:
        past = [night["volume"] for night in history[-settings.nights :] if night.get("volume") is not None]
        usual = float(np.median(past)) if len(past) >= FEWEST_WEEKS else None
        words = f"the median of {len(past)} nights"
    if not usual:
        return [skip("volume", "nothing is usual for these days: quiet ones, or too little history")]
    share = came / usual
    text = f"{came:,} new events, {share:.0%} of the usual {usual:,.0f} ({words})"
    if came == 0 and measured["newest"] is not None:
        reason = f"{text}: a holiday, or the feed has stopped; the age of the newest event decides"
        return [Check("volume", 0.0, settings.min_volume, "warn", reason)]
    remedy = "part of the data is missing; look at last night's files and load them again"
    found = [_above("volume", share, settings.min_volume, text, remedy, 1.4 * settings.min_volume)]
    basket, before = measured["basket"], measured["usual_basket"]
    if basket is None or not before:
        return [*found, skip("events per user", "too few users to tell")]
    text = f"{basket:.1f} events of a user and day, {before:.1f} usual"
    bound = max(0.5, min(settings.min_basket, 0.95 * measured["least_basket"] / before))
    return [
        *found,
        at_least("events per user", basket / before, bound, text, f"rows are missing; {remedy}"),
    ]


def _above(name: str, value: float, bound: float, text: str, remedy: str, warn: float) -> Check:
    """at_least, but what is exactly at the bound blocks: half is missing."""
    found = at_least(name, value, bound, text, remedy, warn)
    return replace(found, verdict="block") if value == bound else found


def check_newest(newest: int | None, night: int, settings: Gate) -> list[Check]:
    """Not too old, and not of the future; newest in seconds, None where there is no clock."""
    if newest is None:
        return [skip("freshness", "timestamps are only an order"), skip("future", "timestamps are only an order")]
    quiet = is_quiet(settings)
    end, shown = (night + 1) * DAY, _moment(newest)
    age = (end - newest) / DAY - sum(quiet(day) for day in _days_between(newest // DAY + 1, night + 1))
    hours = (newest - end) / 3600
    text = f"the newest event is of {shown}"
    return [
        at_most(
            "freshness", age, settings.max_age_days, f"{text}, {max(0.0, age):.1f} days before the night's end",
            f"the feed has stopped, or the night is not {date_of(night)}: `--night` tells the gate its date",
        ),
        at_most(
            "future", hours, settings.future_hours, text if hours <= 0 else f"{text}, {hours:,.0f} h after the night",
            "timestamps lie in the future: a wrong clock or unit at the source; the time split is void",
        ),
    ]  # fmt: skip


def _days_between(first: int, stop: int) -> Iterable[int]:
    """No more of them than matter: a newest event long ago is too old whatever was quiet."""
    return range(max(first, stop - 400), stop)


def check_lost(tonight: Input, live: Input, settings: Gate) -> Check:
    """Events of the time that both runs tell of, which the live release had and tonight's has not."""
    gone = 1 - tonight.rows / max(1, live.rows)
    text = f"{tonight.rows:,} events in all, live {live.rows:,}"
    if tonight.days and live.days:
        since = max(min(tonight.days), min(live.days))
        old = {day: then.events for day, then in live.days.items() if day >= since}
        lost = sum(max(0, then - tonight.days.get(day, Day()).events) for day, then in old.items())
        gone = max(gone, lost / max(1, sum(old.values())))
        text += f"; of the last days that both have, {lost:,} are gone"
    return at_most(
        "lost history", max(0.0, gone), settings.max_lost, text,
        "old events are missing from tonight's input; is a file of task.data.interactions.paths gone?",
    )  # fmt: skip


def check_repeats(tonight: Input, live: Input, measured: Mapping[str, Any], settings: Gate) -> Check:
    """Repeats among the new events, against the share that the live release has."""
    if tonight.days is None or live.days is None or not measured["volume"]:
        return skip("repeated events", "no new events with a clock")
    usual = sum(d.repeats for d in live.days.values()) / max(1, sum(d.events for d in live.days.values()))
    share = measured["repeats"] / measured["volume"]
    return at_most(
        "repeated events", share - usual, settings.max_repeats, f"{share:.2%} of the new events, live {usual:.2%}",
        "files were delivered or appended twice; take the second copy out",
    )  # fmt: skip


def check_copied_days(tonight: Mapping[int, Day] | None, live: Mapping[int, Day] | None) -> Check:
    """Whether what came to a day is exactly another day's, or once more its own, under whatever users."""
    if tonight is None or live is None:
        return skip("copied days", "timestamps are only an order")
    copies: dict[int, int] = {}
    news = new_days(tonight, live)
    for day, more in news.items():
        if more.events < FEW:
            continue
        alike = (other for other, now in tonight.items() if now.digest == more.digest and other != day)
        twins = [other for other in alike if other < day or other not in news]
        twins += [day] if day in live and live[day].digest == more.digest else []
        copies |= {day: twins[0]} if twins else {}
    said = ", ".join(f"{date_of(day)} is {date_of(twin)} again" for day, twin in sorted(copies.items())[:3])
    return at_most(
        "copied days", len(copies), 0, said or f"none of {len(news)} new days",
        "a day was delivered again under another date; take it out and load the right one",
    )  # fmt: skip


def _moment(seconds: int) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return f"second {seconds:,}"
