"""What FAISS cannot do is said before any work, and what it can is let through."""

from __future__ import annotations

import pytest

from pipeline.ann import trial
from pipeline.contracts.errors import SettingsError


@pytest.mark.parametrize(
    "factory",
    [
        "Flat", "SQ8,RFlat", "HNSW16", "HNSW16_SQ8", "PCA8,IVF8,Flat", "OPQ8,IVF32,PQ8", "IVF65536,PQ8",
        "IVF64(PQ8x4fs,RFlat),PQ8x4fsr,Refine(SQfp16)", "IVF256,PQ16x4fs,Refine(SQfp16)", "PQ8", "PQ8x4", "PQ8x4fs",
        "IVF8_HNSW32,SQ8", "PQ8x4fs,RFlat", "PQ8x16", "IVF16,RaBitQfs", "L2norm,IVF32,Flat",
    ],
)  # fmt: skip
def test_what_works_is_let_through(factory: str) -> None:
    trial.attempt(factory, 32)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("IDMap,Flat", "cannot fill shard by shard this kind of index .*IDMap"),
        ("IDMap2,Flat", "cannot fill shard by shard"),
        ("NSG16", r"cannot fill shard by shard .*\(.*NSG does not support incremental addition\); name another"),
        ("IVF32,RQ4x4", r"cannot filter this kind of index \(.*selector not supported.*\); name another, such as"),
        ("IVF32,LSQ2x4fs", "search params not supported"),
        ("IVF8(PQ8x4fs,RFlat),SQ8", r"cannot train .*Number of training points \(8\)"),
    ],
)
def test_what_faiss_would_refuse_later_is_refused_at_once(factory: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as refused:
        trial.attempt(factory, 16)
    assert f"task.index.factory {factory}: FAISS" in str(refused.value)
    assert "/" not in str(refused.value)  # no file of FAISS's source


def test_the_trial_has_the_kind_of_the_factory_and_few_lists() -> None:
    assert trial._small("IVF65536_HNSW32,SQ8") == "IVF4_HNSW32,SQ8"
    assert trial._small("IVF16384(PQ64x4fs,RFlat),PQ64x4fsr") == "IVF256(PQ64x4fs,RFlat),PQ64x4fsr"
    assert trial._small("PCA8,IVF2,Flat") == "PCA8,IVF2,Flat"
