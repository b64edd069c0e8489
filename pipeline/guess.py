"""A settings file guessed from the user's data: what `pinsage init` writes.

Reads the first rows of each file, decides by names and values what every column is, and says why beside each guess, so
that a wrong one is easy to see. Explanations and defaults of the other settings come from `contracts.config`. Memory:
10 000 rows.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipeline.contracts.config import dump_settings, parse_settings, reference
from pipeline.input_files import find_files, peek

WORDS = {
    "user": "user customer member visitor client account buyer reader listener reviewer author person profile "
    "session basket invoice cart order playlist board household",
    "item": "item product movie article sku stock track song book asin pin paper video isbn listing film game recipe "
    "business venue document news",
    "timestamp": "timestamp time datetime date ts created when at",
    "weight": "weight rating score stars strength quantity qty count plays overall",
    "event": "event action behavior behaviour interaction kind type",
    "title": "title name label headline description",
}
"""Words that columns of each role are called by, the likeliest first."""
_TUNED = {
    "task": "seed",
    "task.data": "max_quarantined_share unknown_items",
    "task.split": "kind validation test",
    "task.graph": "weighted half_life_days max_user_degree",
    "task.features": "text_encoder text_dimensions categories",
    "task.walks": "estimator num_neighbours restart_probability entry_budget compose",
    "task.pairs": "window max_gap_seconds num_hard_negatives",
    "task.model": "num_layers hidden_dimensions output_dimensions",
    "task.training": "loss margin epochs batch_size learning_rate",
    "task.index": "factory recall_target",
    "task.evaluation": "k max_events",
    "resources": "rows_per_shard threads",
    "resources.spark": "master driver_memory",
    "resources.training": "ranks threads device",
}
TUNED = tuple(f"{group}.{name}" for group, names in _TUNED.items() for name in names.split())
"""Settings worth changing, written out with their defaults and explanations."""
CHANGE_ME = "CHANGE_ME"
_KEY_WORDS = ("id", "key", "code", "no", "number")
_EPOCHS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6}
_ISO = r"^\s*\d{4}-\d\d-\d\d([T ]\d\d.*)?$"
_NUMBER_LIST = r"^\s*[\[\(]?\s*-?\d+(\.\d+)?([eE][+-]?\d+)?(\s*[,;\s]\s*-?\d+(\.\d+)?([eE][+-]?\d+)?){3,}\s*[\]\)]?\s*$"


@dataclass(frozen=True)
class Profile:
    """What the first rows say about one column. form: text, whole, real, bool, time, numbers, texts or other."""

    name: str
    form: str
    values: pa.Array
    num_rows: int

    @property
    def num_distinct(self) -> int:
        """Different values, nulls aside."""
        return int(pc.count_distinct(self.values).as_py()) if self.form not in ("numbers", "texts", "other") else 0

    @property
    def can_be_key(self) -> bool:
        """Whether sources would take it as a key."""
        whole = self.form == "real" and pc.all(pc.equal(self.values, pc.trunc(self.values))).as_py()
        return self.form in ("text", "whole") or bool(whole)

    def fits(self, role: str) -> float:
        """How well the name says this role: 0 not at all; a whole name beats a part, an earlier word a later one."""
        parts = [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", self.name)]
        scores = [
            (2.0 if len([p for p in parts if p not in _KEY_WORDS]) == 1 else 1.0) - 0.01 * rank
            for rank, word in enumerate(WORDS[role].split())
            if word in parts or any(part.startswith(word) and len(word) > 3 for part in parts)
        ]
        return max(scores, default=0.0)


@dataclass(frozen=True)
class Guess:
    """One line of the settings file: the dotted name, the value and why."""

    name: str
    value: Any
    reason: str


# ------------------------------------------------------------------------------------------------ the file


def guess_settings(path: str, items: str | None = None) -> str:
    """The text of a commented settings file for interactions at path and, if given, a catalogue at items.

    The two may come in either order, and a catalogue may come alone. Raises DataError if a file cannot be read.
    """
    found = {place: profile(place) for place in (path, items) if place is not None}
    order = sorted(found, key=lambda place: looks_like_items(found[place]))
    events = None if looks_like_items(found[order[0]]) else order[0]
    catalogue = next((place for place in order if place != events), None)
    guesses = [Guess("task.name", _short_name(events or path), "shown in reports")]
    guesses += _interactions(events, found[events] if events else [])
    item_column = next(str(guess.value) for guess in guesses if guess.name.endswith("interactions.item"))
    if catalogue is not None:
        guesses += _items(catalogue, found[catalogue], item_column)
    guesses += _split(guesses)
    guesses.append(Guess("resources.run", f"runs/{_short_name(events or path)}", "where everything is written"))
    return _render(guesses + _defaults(guesses))


def profile(path: str) -> list[Profile]:
    """Look at the first rows of the first file that has any."""
    files = find_files([path], "auto", "the command")
    table = peek(next(file for file in files if not file.is_empty))
    return [_profile(field.name, table.column(place)) for place, field in enumerate(table.schema)]


def looks_like_items(columns: Sequence[Profile]) -> bool:
    """Whether the file lists things, each once, rather than events: a unique key, and no user who does it at a time."""
    keys = [column for column in columns if column.can_be_key and _time_unit(column) in (None, "order")]
    unique = any(column.num_distinct == column.num_rows for column in keys)
    has_user = any(column.can_be_key and column.fits("user") for column in columns)
    units = [(_time_unit(column), column.fits("timestamp")) for column in columns]
    has_time = any(unit and (unit != "order" or named) for unit, named in units)
    return unique and not (has_user and has_time)


def _profile(name: str, column: pa.ChunkedArray) -> Profile:
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    present = values.drop_null()
    return Profile(name, _form(present), present, len(values))


def _form(values: pa.Array) -> str:
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        numbers = pa.types.is_floating(inner) or pa.types.is_integer(inner)
        return "numbers" if numbers else "texts" if pa.types.is_string(inner) else "other"
    if pa.types.is_string(kind):
        return "numbers" if len(values) and pc.all(pc.match_substring_regex(values, _NUMBER_LIST)).as_py() else "text"
    for form, test in (("whole", pa.types.is_integer), ("real", pa.types.is_floating), ("bool", pa.types.is_boolean)):
        if test(kind):
            return form
    if pa.types.is_decimal(kind):
        return "real"
    return "time" if pa.types.is_timestamp(kind) or pa.types.is_date(kind) else "other"


# ------------------------------------------------------------------------------------------------ interactions


def _interactions(path: str | None, columns: Sequence[Profile]) -> list[Guess]:
    base = "task.data.interactions"
    if path is None:
        missing = "not given: who did what, and when; parquet, csv or jsonl"
        names = ("paths", "user", "item", "timestamp")
        return [Guess(f"{base}.{name}", CHANGE_ME, missing if name == "paths" else "column") for name in names]
    guesses, taken = [Guess(f"{base}.paths", _absolute(path), "a file, folder or glob, or a list of them")], set[str]()

    def choose(role: str, candidates: list[Profile], meaning: str, spare: bool = False) -> Profile | None:
        free = [column for column in candidates if column.name not in taken]
        ranked = sorted(free, key=lambda column: -column.fits(role))
        named = [column for column in ranked if column.fits(role)]
        if not named and not (spare and ranked):
            return None
        best = (named or ranked)[0]
        why = "by its name" if named else "by its values and place; no name says it"
        others = [column.name for column in (named or ranked)[1:4]]
        hint = f"; could also be {', '.join(others)}" if others else ""
        guesses.append(Guess(f"{base}.{role}", best.name, f"{meaning}; guessed {why}{_examples(best)}{hint}"))
        taken.add(best.name)
        return best

    times = [column for column in columns if _time_unit(column)]
    certain = [column for column in times if _time_unit(column) != "order"]
    ordering = [column for column in times if column.fits("timestamp")]
    time = choose("timestamp", certain or ordering, "when", spare=bool(certain))
    keys = [column for column in columns if column.can_be_key]
    named = [role for role in ("user", "item") if any(column.fits(role) for column in keys)]
    for role in dict.fromkeys([*named, "user", "item"]):
        if choose(role, keys, "who" if role == "user" else "what", spare=True) is None:
            guesses += [Guess(f"{base}.{role}", CHANGE_ME, "no column looks like a key")]
    if time is None:
        reason = "no column looks like a time; a column that orders a user's events will do, with timestamp_unit: order"
        guesses.append(Guess(f"{base}.timestamp", CHANGE_ME, reason))
    unit = _time_unit(time) if time else "order"
    why = (
        "dates as text or of a date type" if unit == "iso" else "by the size of the values" if time else "nothing known"
    )
    guesses.append(Guess(f"{base}.timestamp_unit", unit, f"{why}; seconds, milliseconds, microseconds, iso or order"))
    weights = [c for c in columns if c.form in ("whole", "real") and len(c.values) and pc.min(c.values).as_py() >= 0]
    if choose("weight", weights, "strength of the event; take it out to count every event once") is None:
        kinds = [c for c in columns if c.form == "text" and 1 < c.num_distinct <= 30]
        event = choose("event", kinds, "kind of event, weighed by event_weights")
        if event is not None:
            found = dict.fromkeys(sorted(event.values.unique().to_pylist()), 1.0)
            guesses.append(Guess(f"{base}.event_weights", found, "the kinds among the first rows; 0 drops a kind"))
    rank = ["paths", "user", "item", "timestamp", "timestamp_unit", "weight", "event", "event_weights"]
    return sorted(guesses, key=lambda guess: rank.index(guess.name.rsplit(".", 1)[-1]))


def _time_unit(column: Profile) -> str | None:
    """The timestamp_unit that fits the values; `order` for other whole numbers, None for what cannot be a time."""
    if column.form == "time":
        return "iso"
    if column.form == "text":
        return "iso" if len(column.values) and pc.all(pc.match_substring_regex(column.values, _ISO)).as_py() else None
    if column.form not in ("whole", "real") or not len(column.values):
        return None
    middle = float(np.median(column.values.to_numpy(zero_copy_only=False)))
    for unit, size in _EPOCHS.items():
        if 3e8 < middle / size < 7.2e9 and (unit != "seconds" or column.fits("timestamp") or middle > 9e8):
            return unit
    return "order" if column.form == "whole" else None


def _split(guesses: Sequence[Guess]) -> list[Guess]:
    unit = next((guess.value for guess in guesses if guess.name.endswith("timestamp_unit")), "seconds")
    if unit != "order":
        return []
    reason = "the order of one user's events says nothing of another's, so no moment splits all"
    return [
        Guess("task.split.kind", "leave_last_out", reason),
        Guess("task.split.validation", 1, "events per user"),
        Guess("task.split.test", 1, "events per user, the last ones"),
    ]


# ------------------------------------------------------------------------------------------------ items


def _items(path: str, columns: Sequence[Profile], item_column: str) -> list[Guess]:
    base = "task.data.items"
    keys = [column for column in columns if column.can_be_key and column.num_distinct == column.num_rows]

    def likeliness(column: Profile) -> tuple[bool, bool, float]:
        is_key = re.search(r"(^|[_\W])(id|key|code)$|I[dD]$", column.name) is not None
        return column.name == item_column, is_key, column.fits("item")

    key = max(keys, key=likeliness, default=None)
    guesses = [Guess(f"{base}.paths", _absolute(path), "a file, folder or glob, or a list of them")]
    if key is None:
        guesses.append(Guess(f"{base}.key", CHANGE_ME, "no column has a different value in every row"))
    else:
        why = "called as in the interactions" if key.name == item_column else "different in every row"
        guesses.append(Guess(f"{base}.key", key.name, f"{why}{_examples(key)}"))
    rest = [column for column in columns if key is None or column.name != key.name]
    titles = [column for column in rest if column.form == "text" and column.fits("title")]
    if titles:
        title = max(titles, key=lambda column: column.fits("title"))
        guesses.append(Guess(f"{base}.title", title.name, f"shown to people{_examples(title)}"))
    contents = [_content(column) for column in rest]
    return [*guesses, Guess(f"{base}.columns", contents, "content; take out what says nothing")]


def _content(column: Profile) -> tuple[dict[str, Any] | None, str]:
    """A column's entry in the settings, None for one to leave out, and why."""
    name, values = column.name, column.values
    if not len(values):
        return None, f"{name}: no value in the first rows"
    if column.form == "numbers":
        return {"name": name, "kind": "vector"}, "lists of numbers"
    if column.form == "texts":
        return {"name": name, "kind": "categorical"}, f"lists of names{_examples(column)}"
    if column.form == "bool":
        return {"name": name, "kind": "categorical"}, "true or false"
    if column.form in ("whole", "real"):
        return _number(column)
    if column.form == "text":
        return _words(column)
    return None, f"{name}: {values.type} is not content as it is; make a number or a name of it"


def _number(column: Profile) -> tuple[dict[str, Any] | None, str]:
    values = column.values.to_numpy(zero_copy_only=False).astype(np.float64)
    values = values[np.isfinite(values)]
    if column.form == "whole" and column.num_distinct == column.num_rows > 20:
        return None, f"{column.name}: a different whole number in every row, so a key rather than content"
    low, middle, high = np.quantile(values, [0, 0.5, 1]) if len(values) else (0.0, 0.0, 0.0)
    entry: dict[str, Any] = {"name": column.name, "kind": "numeric"}
    if low >= 0 and high > 10 * max(middle, 1e-9):
        return {**entry, "log": True}, f"from {low:g} to {high:g}, half of them below {middle:g}: so their logarithm"
    return entry, f"numbers from {low:g} to {high:g}"


def _words(column: Profile) -> tuple[dict[str, Any] | None, str]:
    entry: dict[str, Any] = {"name": column.name, "kind": "categorical"}
    count, shown = len(column.values), _examples(column)
    for separator in ("|", ";", ","):
        pieces = pc.utf8_trim_whitespace(pc.list_flatten(pc.split_pattern(column.values, separator)))
        repeated = len(pieces.unique()) < 0.7 * len(pieces)
        short = pc.mean(pc.utf8_length(pieces)).as_py() < 25
        split = pc.mean(pc.match_substring(column.values, separator).cast(pa.int8())).as_py() > 0.25
        if repeated and short and split:
            return {**entry, "separator": separator}, f"several names in one value{shown}"
    words = pc.mean(pc.list_value_length(pc.utf8_split_whitespace(column.values))).as_py()
    if words < 4 and column.num_distinct <= max(5, 0.2 * count):
        return entry, f"{column.num_distinct} different names in {count} rows{shown}"
    if pc.mean(pc.match_substring_regex(column.values, r"^\w+://").cast(pa.int8())).as_py() > 0.5:
        return None, f"{column.name}: addresses say little as text{shown}"
    if words < 1.5:
        return None, f"{column.name}: single words, nearly all different, look like codes{shown}"
    return {"name": column.name, "kind": "text"}, f"about {words:.0f} words each{shown}"


# ------------------------------------------------------------------------------------------------ writing


def _defaults(guesses: Sequence[Guess]) -> list[Guess]:
    """TUNED settings that were not guessed, with their default and explanation."""
    tree: dict[str, Any] = {}
    for guess in guesses:
        value = [entry for entry, _ in guess.value if entry] if guess.name.endswith(".columns") else guess.value
        _place(tree, guess.name.split("."), value)
    resolved = yaml.safe_load(dump_settings(parse_settings(tree, "the guessed settings")))
    explained = {name: description for name, _, _, description in reference()}
    known = {guess.name for guess in guesses}
    return [Guess(name, _find(resolved, name.split(".")), explained[name]) for name in TUNED if name not in known]


def _render(guesses: Sequence[Guess]) -> str:
    """Nested YAML in the order of the settings model, every key under a comment that explains it."""
    order = [name for name, _, _, _ in reference()]
    first = {name: place for place, name in reversed(list(enumerate(order)))}
    lines = [
        "# Guessed by `pinsage init`: check task.data, then `pinsage run --settings` this file.",
        "# `pinsage settings` explains every setting; those not written here keep their defaults.",
    ]
    open_groups: list[str] = []
    ranked = sorted(guesses, key=lambda guess: (not guess.name.startswith("task."), first.get(guess.name, len(order))))
    for guess in ranked:
        *groups, key = guess.name.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(groups, open_groups, strict=False)) if a != b), None)
        depth = min(len(groups), len(open_groups)) if shared is None else shared
        lines += [f"{'  ' * n}{groups[n]}:" for n in range(depth, len(groups))]
        open_groups = groups
        indent = "  " * len(groups)
        lines += _comment(guess.reason, indent)
        if key == "columns":
            filled = any(entry for entry, _ in guess.value)
            lines += [f"{indent}columns:{'' if filled else ' []'}", *_columns(guess.value, indent)]
        else:
            lines.append(f"{indent}{key}: {_flow(guess.value)}")
    return "\n".join(lines) + "\n"


def _columns(entries: Iterable[tuple[dict[str, Any] | None, str]], indent: str) -> list[str]:
    lines: list[str] = []
    for entry, reason in entries:
        lines += _comment(reason if entry else f"left out: {reason}", indent + "  ")
        lines += [f"{indent}  - {_flow(entry)}"] if entry else []
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(" ".join(text.split()), 110 - len(indent))]


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6)
    return str(text).removesuffix("...\n").strip()


def _place(tree: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
    tree[parts[-1]] = value


def _find(tree: dict[str, Any], parts: Sequence[str]) -> Any:
    for part in parts:
        tree = tree[part]
    return tree


def _examples(column: Profile) -> str:
    shown = [str(value) for value in column.values[:50].unique()[:3].to_pylist()] if column.form != "texts" else []
    return f", such as {', '.join(text if len(text) <= 24 else text[:21] + '...' for text in shown)}" if shown else ""


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())


def _short_name(path: str) -> str:
    """A name for the task from the file's, or from its folder's if that says nothing."""
    parts = [part.split(".")[0] for part in PurePosixPath(path).parts]
    plain = re.compile(r"|[/\W]*|interactions?|events?|ratings?|items?|data|part.*|.*\*.*")
    telling = [part for part in parts if not plain.fullmatch(part)]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", telling[-1]).strip("-") if telling else "pinsage"
