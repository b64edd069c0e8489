"""A digest is of every bit, and the same however many rows or bytes are digested beside it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.digests import ByteDigest, digest_lists, digest_rows


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("width", [1, 3, 8, 128])
def test_a_row_has_the_same_digest_alone_and_among_others(dtype: str, width: int) -> None:
    rows = (np.random.default_rng(0).random((21, width)) * 200).astype(dtype)
    together = digest_rows(rows)
    assert together.tolist() == [int(digest_rows(row[None])[0]) for row in rows]
    assert digest_rows(rows[:0]).shape == (0,)


def test_a_list_has_the_same_digest_alone_and_among_others() -> None:
    """Runs of one length, longer and shorter than what goes side by side, and others between."""
    lengths = [5] * 9 + [0, 0, 3] + [2] * 8 + [0] * 17 + [1, 4, 4]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    random = np.random.default_rng(1)
    ids = random.integers(0, 1 << 32, indptr[-1], np.uint32)
    weights = random.random(indptr[-1]).astype(np.float32)
    together = digest_lists(indptr, ids, weights)
    for row, (start, stop) in enumerate(itertools.pairwise(indptr)):
        alone = digest_lists(np.array([0, stop - start]), ids[start:stop], weights[start:stop])
        assert alone[0] == together[row]
    filled = np.array(lengths) > 0
    assert len(np.unique(together[filled])) == filled.sum()


def digest(*pieces: bytes | bytearray | memoryview) -> str:
    """Of bytes that come piece by piece."""
    made = ByteDigest()
    for piece in pieces:
        made.update(piece)
    return made.hexdigest()


@pytest.mark.parametrize("size", [0, 1, 7, 512, 513, 1100])
def test_every_bit_and_the_size_of_some_bytes_count(size: int) -> None:
    data = np.random.default_rng(2).integers(0, 256, size, np.uint8).tobytes()
    own = digest(data)
    assert own == digest(bytearray(data)) == digest(memoryview(data)) == digest(data[:512], data[512:])
    others = {digest(data + b"\0")}
    for place in range(0, 8 * size, 5):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        others.add(digest(changed))
    assert own not in others
    assert len(others) == 1 + len(range(0, 8 * size, 5))


def test_nothing_follows_a_piece_of_an_odd_size() -> None:
    with pytest.raises(ValueError, match="512"):
        digest(b"odd", b"more")
