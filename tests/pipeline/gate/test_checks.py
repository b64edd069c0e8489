"""Every check at its bound, on either side of it, and on what is no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline import ranking
from pipeline.contracts.config import Gate
from pipeline.gate import checks
from pipeline.gate.checks import Check

GATE = Gate()


def grades(found: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in found}


@pytest.mark.parametrize(
    ("value", "expected"), [(0.1, "pass"), (0.2, "pass"), (0.25, "warn"), (0.3, "warn"), (0.31, "block")]
)
def test_a_bound_from_above_blocks_only_beyond_it(value: float, expected: str) -> None:
    found = checks.at_most("x", value, 0.3, "found", "do this", warn=0.2)
    assert found.verdict == expected
    assert (found.value, found.bound) == (value, 0.3)
    assert found.reason == ("found" if expected == "pass" else "found: do this")


@pytest.mark.parametrize(("value", "expected"), [(0.9, "pass"), (0.8, "pass"), (0.6, "warn"), (0.59, "block")])
def test_a_bound_from_below_blocks_only_beyond_it(value: float, expected: str) -> None:
    found = checks.at_least("x", value, 0.6, "found", "do this", warn=0.8)
    assert (found.verdict, found.value, found.bound) == (expected, value, 0.6)


def test_what_is_no_number_blocks_and_is_stored_as_null() -> None:
    for found in (checks.at_most("x", math.nan, 1, "", ""), checks.at_least("x", math.nan, 1, "", "")):
        assert (found.verdict, found.value) == ("block", None)


@pytest.mark.parametrize(
    ("now", "high", "expected"),
    [
        (0.20, 0.01, "pass"),
        (0.191, 0.001, "pass"),  # less than tolerated, and it may be chance
        (0.191, -0.001, "warn"),  # a sure loss, but tolerated
        (0.189, 0.001, "warn"),  # more than tolerated, but it may be chance
        (0.189, None, "warn"),  # all questions of one user
        (0.189, -0.001, "block"),
    ],
)
def test_only_a_loss_that_is_large_and_sure_blocks(now: float, high: float | None, expected: str) -> None:
    found = checks.check_loss("MRR", now, 0.2, None if high is None else -0.02, high, 0.05)
    assert found.verdict == expected
    assert found.value == pytest.approx((0.2 - now) / 0.2)


def compared(now: np.ndarray, then: np.ndarray) -> dict[str, Any]:
    values = {
        run: ranking.query_metrics(ranks, np.arange(len(ranks)), len(ranks), [10])
        for run, ranks in (("tonight", now), ("live", then))
    }
    users = np.arange(len(now)) // 3
    return {
        "questions": len(now),
        "targets": len(now),
        **ranking.compare(values, users, ranking.metric_names([10]), 500, 1),
    }


def test_the_same_questions_tell_a_small_loss_that_unpaired_intervals_would_not() -> None:
    then = np.random.default_rng(3).integers(1, 40, size=600).astype(float)
    worse, equal = then + (np.arange(600) % 2), then.copy()
    found = grades(checks.check_quality({"all": compared(worse, then), "cold": compared(equal, then)}, GATE))
    assert found == {
        "MRR against live": "block",
        "hit-rate@10 against live": "warn",
        "MRR against live, cold items": "pass",
        "hit-rate@10 against live, cold items": "pass",
    }


def test_a_few_items_that_are_asked_for_often_say_nothing_of_the_others() -> None:
    then = np.ones(600)
    for targets, expected in ((checks.FEW_TARGETS - 1, "skip"), (checks.FEW_TARGETS, "block")):
        cold = {**compared(then + 50, then), "targets": targets}
        found = grades(checks.check_quality({"all": compared(then, then), "cold": cold}, GATE))
        assert found["MRR against live, cold items"] == expected


def test_too_few_questions_say_nothing() -> None:
    ranks = np.ones(GATE.min_questions - 1)
    found = grades(checks.check_quality({"all": compared(ranks + 50, ranks)}, GATE))
    assert set(found.values()) == {"skip"}
    enough = np.ones(GATE.min_questions)
    assert grades(checks.check_quality({"all": compared(enough + 50, enough)}, GATE))["MRR against live"] == "block"


def evaluated(queries: int = 500, **mrr: float) -> dict[str, Any]:
    methods = {name.replace("_", " ").replace("kNN", "kNN"): {"mrr": {"mean": value}} for name, value in mrr.items()}
    return {"tasks": {"item_to_item": {"slices": {"all": {"counts": {"queries": queries}, "methods": methods}}}}}


@pytest.mark.parametrize(("own", "expected"), [(0.1, "pass"), (0.099, "block")])
def test_a_model_below_popularity_is_broken(own: float, expected: str) -> None:
    found = grades(checks.check_floors(evaluated(PinSage=own, popularity=0.1), GATE))
    assert found == {"MRR over popularity": expected, "MRR over content-only kNN": "skip"}


def test_floors_that_are_not_asked_or_cannot_be_are_skipped() -> None:
    metrics = evaluated(PinSage=0.1, popularity=0.2)
    assert grades(checks.check_floors(metrics, Gate(over_popularity=0)))["MRR over popularity"] == "skip"
    assert grades(checks.check_floors(evaluated(5, PinSage=0.1, popularity=0.2), GATE))["MRR over popularity"] == "skip"
    nothing = {"tasks": {"item_to_item": {"num_ranked": 0, "slices": {}}}}
    assert set(grades(checks.check_floors(nothing, GATE)).values()) == {"skip"}
    free = checks.check_floors(evaluated(PinSage=0.1, popularity=0.0), GATE)[0]
    assert (free.verdict, free.value) == ("pass", None)


def test_quality_that_sinks_night_after_night_is_told_but_does_not_block() -> None:
    history: list[dict[str, Any]] = [{"mrr": 0.2}, {"mrr": None}, {"mrr": 0.19}, {"mrr": 0.21}]
    assert checks.check_trend(0.181, history, GATE).verdict == "pass"
    assert checks.check_trend(0.179, history, GATE).verdict == "warn"
    assert checks.check_trend(0.1, history[:3], GATE).verdict == "skip"


@pytest.mark.parametrize(("recall", "expected"), [(0.95, "pass"), (0.94, "warn"), (0.93, "warn"), (0.929, "block")])
def test_recall_may_miss_its_target_by_the_slack(recall: float, expected: str) -> None:
    assert checks.check_recall(recall, 0.95, Gate(recall_slack=0.02)).verdict == expected


GOOD = {"total": 1000, "rows": 1000, "zeros": 0, "not_finite": 0, "norm": 1.0, "spread": 0.8}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"total": 998}, "coverage"),
        ({"zeros": 2}, "coverage"),
        ({"not_finite": 2}, "coverage"),
        ({"spread": 0.019}, "embedding spread"),
        ({"spread": 0.39}, "spread against live"),
        ({"spread": math.nan}, "embedding spread"),
        ({"norm": 2.01}, "embedding length against live"),
        ({"norm": 0.49}, "embedding length against live"),
    ],
)
def test_collapsed_or_missing_embeddings_are_blocked_by_their_check(change: dict[str, float], name: str) -> None:
    assert set(grades(checks.check_embeddings(GOOD, GOOD, 1000, GATE)).values()) == {"pass"}
    assert grades(checks.check_embeddings({**GOOD, **change}, GOOD, 1000, GATE))[name] == "block"


def test_embeddings_at_their_bounds_pass() -> None:
    edge = {**GOOD, "zeros": 1, "spread": 0.4, "norm": 2.0}
    assert set(grades(checks.check_embeddings(edge, GOOD, 1000, GATE)).values()) == {"pass"}


CONTENT = {"rows": 100, "zeros": 10, "constant": 4, "columns": 40, "missing": {"title": 0.1, "price": 0.0}}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"zeros": 16}, "items without content"),
        ({"constant": 9}, "constant content columns"),
        ({"missing": {"title": 0.1, "price": 0.051}}, "missing content"),
    ],
)
def test_content_that_vanishes_is_blocked_by_its_check(change: dict[str, Any], name: str) -> None:
    found = grades(checks.check_features({**CONTENT, **change}, CONTENT, GATE))
    assert {check for check, grade in found.items() if grade == "block"} == {name}
    edge = {**CONTENT, "zeros": 15, "constant": 8, "missing": {"title": 0.15, "price": 0.0}}
    assert set(grades(checks.check_features(edge, CONTENT, GATE)).values()) == {"pass"}


def test_a_first_release_without_any_content_is_blocked_and_an_item_set_without_columns_skipped() -> None:
    zeroed = {**CONTENT, "zeros": 100, "constant": 40}
    assert set(grades(checks.check_features(zeroed, None, GATE)).values()) == {"block"}
    assert set(grades(checks.check_features(CONTENT, None, GATE)).values()) == {"pass"}
    assert set(grades(checks.check_features({"columns": 0, "missing": {}}, None, GATE)).values()) == {"skip"}


def test_a_new_model_may_move_more_than_the_same_one() -> None:
    same = grades(checks.check_movement(0.6, 0.3, True, GATE))
    new = grades(checks.check_movement(0.6, 0.3, False, GATE))
    assert set(same.values()) == {"block"}
    assert set(new.values()) == {"pass"}
    assert grades(checks.check_movement(0.91, 0.71, False, GATE)) == dict.fromkeys(new, "block")
    assert grades(checks.check_movement(0.1, None, True, GATE))["embedding drift"] == "skip"


def test_the_degree_shift_is_the_distance_worked_by_hand() -> None:
    # a quarter of the items moves from log2(1 + 3) = 2 to log2(1 + 1) = 1
    assert checks.degree_shift([[1, 150], [3, 50]], [[1, 10], [3, 10]]) == pytest.approx(0.25)
    assert checks.degree_shift([[0, 5], [7, 5]], [[7, 1]]) == pytest.approx(1.5)
    assert checks.degree_shift([[1, 3]], [[1, 7]]) == 0
    assert checks.degree_shift([], []) == 0


def test_degrees_that_grow_over_an_octave_pass_and_halved_ones_block() -> None:
    base = [[56, 100]]
    assert checks.check_degrees([[64, 100]], base, GATE).verdict == "pass"
    assert checks.check_degrees([[72, 100]], base, GATE).verdict == "warn"
    assert checks.check_degrees([[28, 100]], base, GATE).verdict == "block"
