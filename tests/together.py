"""Several real processes that work together over gloo, each a fork of the test: no command, no import, a tenth of a second."""

import datetime
import json
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(seconds=60)


def together(folder, work, processes=2):
    """What ``work(rank)`` gives in each process, as plain data; a process that waits for another in vain fails."""
    children = [child for rank in range(processes) if (child := _forked(Path(folder), work, rank, processes))]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [(Path(folder) / f"said.{rank}").read_text() for rank in range(processes)]
    assert not any(statuses), "\n".join(said)
    return [json.loads(text) for text in said]


def _forked(folder, work, rank, processes):
    if child := os.fork():
        return child
    said, status = "", 1
    try:
        torch.set_num_threads(1)  # a fork has none of the threads that its parent computed with
        dist.init_process_group("gloo", f"file://{folder}/meet", timeout=PATIENCE, rank=rank, world_size=processes)
        said, status = json.dumps(work(rank)), 0
    except BaseException:
        said = traceback.format_exc()
    finally:
        (folder / f"said.{rank}").write_text(said)
        os._exit(status)  # not through the test runner
