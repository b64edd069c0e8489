"""torchrun that dies with whoever started it, so that a killed `pinsage run` leaves no trainer writing.

`python -m jobs.launch --standalone --nproc-per-node=2 --module jobs.train --settings FILE`: torchrun's arguments.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile

from model.lifetime import VERDICT, die_with_parent, expect_children

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
"""glibc keeps what large tensors leave behind for the next ones: pages fresh from the kernel cost 3 to 7 times the
work that is done in them on a virtual machine. Read by the ranks when they start."""


def main() -> None:
    """Tie this process to its parent, then be torchrun."""
    die_with_parent()
    expect_children()
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    folder = tempfile.TemporaryDirectory(prefix="pinsage-verdict-")
    os.environ[VERDICT] = os.path.join(folder.name, "final")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    from torch.distributed.run import main as torchrun

    torchrun(sys.argv[1:])


if __name__ == "__main__":
    main()
