"""torchrun that dies with whoever started it, so that a killed `pinsage run` leaves no trainer writing.

`python -m jobs.launch --standalone --nproc-per-node=2 --module jobs.train --settings FILE`: torchrun's arguments.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile

from model.lifetime import VERDICT, die_with_parent, expect_children


def main() -> None:
    """Tie this process to its parent, then be torchrun."""
    die_with_parent()
    expect_children()
    folder = tempfile.TemporaryDirectory(prefix="pinsage-verdict-")
    os.environ[VERDICT] = os.path.join(folder.name, "final")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    from torch.distributed.run import main as torchrun

    torchrun(sys.argv[1:])


if __name__ == "__main__":
    main()
