"""torchrun that dies with whoever started it, so that a killed `pinsage run` leaves no trainer writing.

`python -m jobs.launch --standalone --nproc-per-node=2 --module jobs.train --settings FILE`: torchrun's arguments.
"""

from __future__ import annotations

from jobs.interrupts import held_back

# isort: split
import logging
import os
import sys
import tempfile
import threading

from model.lifetime import VERDICT, die_with_parent, expect_children


def main() -> None:
    """Tie this process to its parent, then be torchrun."""
    die_with_parent()
    expect_children()
    folder = tempfile.TemporaryDirectory(prefix="pinsage-verdict-")
    os.environ[VERDICT] = os.path.join(folder.name, "final")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as torchrun

    for logger in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(logger).setLevel(logging.ERROR)  # torch sets it, too, when it is imported
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # interrupts reach the process by it
    try:
        with held_back():
            torchrun(sys.argv[1:])
    except SignalException as stopped:  # the ranks were told, and have said what a person has to know
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
