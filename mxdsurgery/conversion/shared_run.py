"""How ``convert`` and ``heal`` begin and end: a run in its folder, of one process or of several launched together."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxdsurgery.errors import OutputError
from mxdsurgery.recipe import Recipe
from mxdsurgery.runs.parallel import check_parallel, processes, rank
from mxdsurgery.runs.run_folder import RunFolder, depends_on
from mxdsurgery.terminal.console import Reporter
from mxdsurgery.training.accelerator import start_processes


@contextmanager
def shared_run(
    target: Path, recipe: Recipe, more: Mapping[str, Any], resume: bool, overwrite: bool, reporter: Reporter
) -> Iterator[tuple[RunFolder, Reporter]]:
    """A run that makes ``target``, started or resumed; on success, its run folder is removed.

    Args:
        target: where the result goes.
        recipe: what the run depends on; also parallel, device and when to write checkpoints.
        more: what else the run depends on; see `RunFolder.confirm`.
        resume: go on with an unfinished run.
        overwrite: begin anew, whatever is there.
        reporter: is told by the first process only.

    Yields:
        The run, and the reporter to use within it, which also records.

    Raises:
        DeviceError: the device is not there.
        OutputError, RunInUseError, CheckpointError: see `RunFolder.open`.
        Interrupted, MxDError: see `RunFolder.working`.
    """
    start_processes(recipe)
    check_parallel(recipe)
    run = RunFolder(target, recipe)
    run.open(depends_on(recipe.to_dict()) | {"processes": processes()} | dict(more), resume, overwrite)
    first = rank() == 0  # asked now: at the end, the processes have parted
    with run.working(reporter if first else Reporter()) as recording:
        if first and target.exists() and not overwrite:
            raise OutputError(f"another process wrote {str(target)!r} meanwhile", fix="give another --out, or --overwrite")
        yield run, recording
    if first:
        run.finish(target)
