"""The choice fits its budget, can reach its target, and says what it would need."""

from __future__ import annotations

import re

import faiss
import numpy as np
import pytest

from pipeline.ann import choice
from pipeline.ann.choice import check_given, choose, count_lists, estimate_bytes
from pipeline.contracts.errors import SettingsError

ROWS = 4_000_000


@pytest.mark.parametrize(
    ("num_vectors", "bytes_each", "target", "expected"),
    [
        (500, None, 0.95, "Flat"),
        (20_000, None, 0.95, "Flat"),
        (50_000, None, 0.95, "IVF1024,Flat"),
        (10**6, None, 0.95, "IVF4096,PQ64x4fsr,Refine(SQfp16)"),
        (10**6, 200, 0.95, "IVF4096,SQ8"),
        (10**6, 110, 0.9, "IVF4096,SQ6"),
        (10**7, None, 0.95, "IVF16384(PQ64x4fs,RFlat),PQ64x4fsr,Refine(SQfp16)"),
        (10**9, 140, 0.95, "IVF65536(PQ64x4fs,RFlat),SQ8"),
    ],
)
def test_the_table_says_which(num_vectors: int, bytes_each: int | None, target: float, expected: str) -> None:
    memory = None if bytes_each is None else bytes_each * num_vectors
    chosen = choose(num_vectors, 128, memory, target, ROWS, gpu=False)
    assert chosen.factory == expected
    assert memory is None or chosen.bytes <= memory


def test_a_budget_or_a_target_that_nothing_meets_says_what_would_be_needed() -> None:
    with pytest.raises(
        SettingsError, match=r"SQ8 takes 13\d,\d+,\d+ bytes.*SQ6 can reach 0.94.*raise task.index.memory"
    ):
        choose(10**6, 128, 10**8, 0.95, ROWS, gpu=False)


def test_an_odd_width_has_no_4_bit_pairs() -> None:
    assert choose(10**6, 127, None, 0.95, ROWS, gpu=False).factory == "IVF4096,Flat"
    assert choose(10**7, 127, None, 0.95, ROWS, gpu=False).factory == "IVF16384_HNSW32,Flat"


@pytest.mark.parametrize("train_rows", [50, 1000, 500_000])
@pytest.mark.parametrize("num_vectors", [2, 1000, 20_001, 158_357, 10**6, 10**9])
def test_every_centroid_can_see_enough_points(num_vectors: int, train_rows: int) -> None:
    nlist = count_lists(num_vectors, train_rows)
    assert nlist == 1 or nlist * choice.POINTS_PER_CENTROID <= min(num_vectors, train_rows)
    assert nlist & (nlist - 1) == 0
    assert nlist <= count_lists(num_vectors, train_rows, gpu=True)


def test_a_day_more_of_items_keeps_the_number_of_lists() -> None:
    assert len({count_lists(n, ROWS) for n in range(1_000_000, 1_010_000, 1000)}) == 1


@pytest.mark.parametrize(
    "factory",
    [
        "Flat", "SQ8", "IVF16,Flat", "IVF16_HNSW32,SQ8", "IVF16,PQ16x4fsr,Refine(SQfp16)", "HNSW16", "PCA16,IVF16,Flat",
        "IVF64(PQ16x4fs,RFlat),SQ8", "PQ16x4fs",
    ],
)  # fmt: skip
def test_the_estimate_is_near_what_is_stored(factory: str) -> None:
    vectors = np.random.default_rng(1).normal(size=(8000, 32)).astype(np.float32)
    index = choice.make(factory, 32)
    index.train(vectors)
    index.add(vectors)
    assert estimate_bytes(factory, 8000, 32) == pytest.approx(len(faiss.serialize_index(index)), rel=0.12)


@pytest.mark.parametrize("factory", ["IVFfour", "PQ5"])
def test_a_factory_that_faiss_does_not_know_is_refused(factory: str) -> None:
    with pytest.raises(SettingsError, match="does not build it for 16 dimensions"):
        check_given(factory, 300, 16, None)


def test_the_readme_has_the_table() -> None:
    from tests.runs import ROOT

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for profile in choice.PROFILES:
        pattern = profile.pattern.replace("{lists}", "n").replace("{half}", "d/2")
        assert re.search(rf"\| `{re.escape(pattern)}` \|", text), pattern


def test_what_the_driver_cannot_merge_in_memory_is_a_kind_that_can_lie_on_disk() -> None:
    """A catalogue that grows past the driver's memory gets another index, not an error at night."""
    small = choose(1_000_000, 128, None, 0.95, 4_000_000, False, 8 << 30)
    assert "Refine" in small.factory
    large = choose(100_000_000, 128, None, 0.95, 4_000_000, False, 8 << 30)
    assert large.factory == "IVF32768(PQ64x4fs,RFlat),SQ8"
    assert choose(100_000_000, 128, None, 0.99, 4_000_000, False, 8 << 30).factory == "IVF32768(PQ64x4fs,RFlat),Flat"
    assert "resources.index.merge_memory is 8,589,934,592" in large.reason
