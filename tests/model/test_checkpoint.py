"""Checkpoints: whole, of the right lineage, or not used at all."""

from __future__ import annotations

import logging

import pytest
import torch

from model import checkpoint
from pipeline.contracts.storage import Storage

STATE = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "position": [2, 5], "history": [{"loss": 0.1}]}


@pytest.fixture
def saved(storage: Storage) -> bytes:
    checkpoint.save(storage, "lineage", STATE)
    data = checkpoint.read(storage)
    assert data is not None
    return data


def test_a_state_comes_back_as_it_was(saved: bytes) -> None:
    state = checkpoint.decode(saved, "lineage")
    assert state is not None
    assert torch.equal(state.pop("model")["weight"], STATE["model"]["weight"])  # type: ignore[index]
    assert state == {"position": [2, 5], "history": [{"loss": 0.1}]}


def test_without_a_checkpoint_training_starts_anew(storage: Storage, saved: bytes) -> None:
    checkpoint.delete(storage)
    assert checkpoint.decode(checkpoint.read(storage), "lineage") is None


@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit"])
def test_a_damaged_checkpoint_is_not_used_and_said_so(
    saved: bytes, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    changed = bytearray(saved)
    changed[len(saved) // 2] ^= 1
    data = {"cut": saved[: len(saved) // 2], "emptied": b"", "one bit": bytes(changed)}[damage]
    assert checkpoint.decode(data, "lineage") is None
    assert "model/checkpoint.pt is damaged" in caplog.text
    assert "starts from the beginning" in caplog.text


def test_another_lineages_checkpoint_is_not_used_and_said_so(saved: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert checkpoint.decode(saved, "other") is None
    assert "of other settings or inputs" in caplog.text
