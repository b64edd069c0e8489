"""Checkpoints: whole, of the right lineage, or not used at all; the last and the best are kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.checkpoint import FOLDER, Keeper
from pipeline.contracts.datasets import Lineage
from pipeline.contracts.errors import SettingsError, StorageError
from pipeline.contracts.storage import Storage

STATE = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "position": [2, 5], "history": [{"loss": 0.1}]}
LINEAGE = Lineage("train", {"task.training": {"loss": "bpr", "epochs": 3}}, {"pairs": "abc", "world_size": "2"})


def save(storage: Storage, *states: tuple[int, float | None], keep: int = 2, lineage: Lineage = LINEAGE) -> None:
    keeper = Keeper(storage, lineage, keep)
    for step, metric in states:
        keeper.save(step, {**STATE, "step": step}, metric)
    keeper.close()


def test_a_state_comes_back_as_it_was(storage: Storage) -> None:
    save(storage, (7, None))
    state = checkpoint.decode(checkpoint.read(storage), LINEAGE)
    assert state is not None
    assert torch.equal(state.pop("model")["weight"], STATE["model"]["weight"])  # type: ignore[index]
    assert state == {"position": [2, 5], "history": [{"loss": 0.1}], "step": 7, "kept": [["step-000000007.pt", None]]}


def test_what_training_changes_after_a_save_is_not_in_it(storage: Storage) -> None:
    weight = torch.zeros(3)
    keeper = Keeper(storage, LINEAGE, 1)
    keeper.save(1, {"weight": weight, "position": [1, 0]})
    weight += 1
    keeper.close()
    state = checkpoint.decode(checkpoint.read(storage), LINEAGE)
    assert state is not None
    assert state["weight"].tolist() == [0, 0, 0]


def test_the_last_and_the_best_are_kept(storage: Storage) -> None:
    metrics = [0.5, 0.9, None, 0.1, 0.8, 0.2, None]
    save(storage, *enumerate(metrics, start=1))
    assert storage.names(FOLDER) == [f"step-{step:09d}.pt" for step in (2, 5, 6, 7)]


def test_without_a_checkpoint_training_starts_anew(storage: Storage) -> None:
    save(storage, (7, None))
    checkpoint.delete(storage)
    assert checkpoint.decode(checkpoint.read(storage), LINEAGE) is None


@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    storage: Storage, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(storage, (7, None), (8, None))
    path = f"{FOLDER}/step-000000008.pt"
    data = storage.read_bytes(path)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    storage.write_bytes(path, {"cut": data[: len(data) // 2], "emptied": b"", "one bit": bytes(changed)}[damage])
    state = checkpoint.decode(checkpoint.read(storage), LINEAGE)
    assert state is not None
    assert state["step"] == 7
    assert "step-000000008.pt is damaged" in caplog.text


def test_a_checkpoint_of_other_data_is_not_used_and_said_so(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    save(storage, (7, None))
    other = Lineage(LINEAGE.stage, LINEAGE.settings, {**LINEAGE.inputs, "pairs": "xyz"})
    with caplog.at_level(logging.INFO):
        assert checkpoint.decode(checkpoint.read(storage), other) is None
    assert "of other data (pairs)" in caplog.text


def test_a_checkpoint_of_other_settings_is_refused_by_name(storage: Storage) -> None:
    save(storage, (7, None))
    other = Lineage(LINEAGE.stage, {"task.training": {"loss": "softmax", "epochs": 3}}, LINEAGE.inputs)
    message = r"epoch 2 step 5 of other settings: task.training.loss was bpr and is softmax; .*`pinsage train --force`"
    with pytest.raises(SettingsError, match=message):
        checkpoint.decode(checkpoint.read(storage), other)


def test_other_threads_or_ranks_go_on_with_a_warning(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {**LINEAGE.settings, "resources.training.threads": 2}
    save(storage, (7, None), lineage=Lineage(LINEAGE.stage, settings, LINEAGE.inputs))
    inputs = {**LINEAGE.inputs, "world_size": "1"}
    other = Lineage(LINEAGE.stage, {**settings, "resources.training.threads": 4}, inputs)
    assert checkpoint.decode(checkpoint.read(storage), other) is not None
    assert "resources.training.threads, world_size changed since the checkpoint" in caplog.text


def test_a_full_disk_costs_a_warning_and_the_checkpoint_before_counts(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Keeper(storage, LINEAGE, 2)
    keeper.save(1, {**STATE, "step": 1})
    keeper.wait()

    def full(*arguments: Any) -> None:
        raise StorageError("write: no space left on device")

    monkeypatch.setattr(Storage, "write_bytes", full)
    keeper.save(2, {**STATE, "step": 2})
    keeper.wait()
    monkeypatch.undo()
    assert "no checkpoint at step-000000002.pt: write: no space left on device; training goes on" in caplog.text
    state = checkpoint.decode(checkpoint.read(storage), LINEAGE)
    assert state is not None
    assert state["step"] == 1
    keeper.save(3, {**STATE, "step": 3})
    keeper.close()
    assert storage.names(FOLDER) == ["step-000000001.pt", "step-000000003.pt"]


def test_nothing_but_tensors_and_plain_values_is_loaded(storage: Storage, tmp_path: Path) -> None:
    """A file that would run code when unpickled is not resumed from."""
    save(storage, (7, None))
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    keeper = Keeper(storage, LINEAGE, 1)
    keeper.save(8, {"position": [1, 0], "evil": Evil()})
    keeper.close()
    assert checkpoint.decode(checkpoint.read(storage), LINEAGE) is None
    assert not marker.exists()
