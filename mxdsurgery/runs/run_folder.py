"""The folder beside a result that a run works in until the result is there.

``<out>.run`` holds recipe.yaml and plan.json, log.txt and metrics.jsonl (mxdsurgery.runs.journal), and the last
checkpoints (mxdsurgery.runs.resume). It is removed when the run ends well; else ``--resume`` goes on from it. While a process
works in it, it holds owner.json, and no other may (mxdsurgery.runs.owner).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxdsurgery.aside import MARKER, mark
from mxdsurgery.errors import CheckpointError, DivergedError, Interrupted, MxDError, OutputError, RunInUseError, first_line
from mxdsurgery.hardware.threads import asked_for, set_threads
from mxdsurgery.outside import shown
from mxdsurgery.recipe import CHECKPOINT_KEYS, COMPUTE_KEYS, Recipe
from mxdsurgery.runs.journal import LOG_FILE, METRICS_FILE, Journal, Recording
from mxdsurgery.runs.owner import OWNER_FILE, Ownership, read_owner
from mxdsurgery.runs.parallel import any_of, first_ones, rank, text_shares, wait
from mxdsurgery.runs.resume import Checkpoint, Checkpoints, Files, Parts
from mxdsurgery.terminal.console import Reporter

# What is in training, in a checkpoint.
TRAINING_FILE = "training.safetensors"
# A run may go on with other values of these: they do not change what is trained; for threads, `keep_threads` sees to that.
_FREE_KEYS = {
    *CHECKPOINT_KEYS,
    "cache_activations",
    "overwrite",
    "out",
    "tracker",
    "memory",
    "device",
    "threads",
    "trust_remote_code",
    "eval_tokens_single",
}


# What is written into a run folder, as patterns, beside owner.json and the marker.
_WRITTEN = ("checkpoints", "checkpoints.*", "scratch", "scratch.*", "catalogue", "share.*.json", ".*.aside")
_WRITTEN += ("recipe.yaml", "plan.json", LOG_FILE, METRICS_FILE)
# How metrics.jsonl begins, whichever version wrote it.
_METRICS = b'{"time": "'


class Stop:
    """Whether the run was asked to stop."""

    asked = False


@contextmanager
def stoppable(say: Callable[[str], None]) -> Iterator[Stop]:
    """While open, the first Ctrl-C or SIGTERM only asks the run to stop; the second interrupts as usual. Main thread only."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        name = signal.Signals(number).name
        say(f"stopping   {name}: this step is finished first, and a checkpoint written; once more: at once, without")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, ask)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunFolder:
    """The folder that a run works in, and what it does after each step.

    Args:
        out: the result's place; the folder is ``<out>.run``. None: nothing is written anywhere.
        recipe: parallel, checkpoint_every, checkpoint_minutes, keep_checkpoints.
    """

    def __init__(self, out: Path | None, recipe: Recipe) -> None:
        self.path = None if out is None else out.with_name(out.name + ".run")
        self.shares = text_shares(recipe)
        self.own = f".{rank()}" if rank() else ""  # ends the names of folders that only this process uses
        self.writes = self.path is not None and (rank() == 0 or self.shares == 1)
        self.checkpoints = None
        if self.path is not None:
            self.checkpoints = Checkpoints(
                self.path / ("checkpoints" + (self.own if self.writes else "")),
                every=recipe.checkpoint_every,
                minutes=recipe.checkpoint_minutes,
                keep=recipe.keep_checkpoints,
            )
        self.journal = Journal(None)
        self.identity: dict[str, Any] = {}
        self.resumed: Checkpoint | None = None
        self.stop = Stop()
        self.at = 0  # the step of the last checkpoint
        self.computes = {name: getattr(recipe, name) for name in COMPUTE_KEYS}
        self.anew = ""  # how to begin anew, for people
        self.owner: Ownership | None = None  # of the first process, while the run is open

    @property
    def scratch(self) -> Path | None:
        """A folder for the temporary files of this process, on the file system of the result."""
        return None if self.path is None else self.path / f"scratch{self.own}"

    def as_begun(self, chosen: Recipe, say: Callable[[str], None], resume: bool = False) -> Recipe:
        """The recipe with the dtypes that a resumed run began with; else with those that the first of several processes chose.

        Args:
            chosen: the recipe with the dtypes that this machine would compute in, in place of each ``auto``.
            say: is told if the run computes in another one.
            resume: whether to look in the last checkpoint, because the run is not opened yet.
        """
        found = self.checkpoints.latest(self.anew) if resume else self.resumed
        begun = None if found is None else found.state.get("computes")  # a checkpoint of an older version has none
        settled = dataclasses.replace(chosen, **begun or first_ones({name: getattr(chosen, name) for name in COMPUTE_KEYS}))
        if settled.compute != chosen.compute:
            say(f"compute    {settled.compute}, as the run began; here it would have been {chosen.compute}")
        self.computes = {name: getattr(settled, name) for name in COMPUTE_KEYS}
        return settled

    def open(self, identity: Mapping[str, Any], resume: bool, overwrite: bool, anew: str = "--overwrite") -> None:
        """Begins the run, or resumes it: ``resumed`` is then the checkpoint that it goes on from.

        Args:
            identity: what the run depends on, as plain data; see `confirm`.
            resume: go on from the last checkpoint, if there is one.
            overwrite: begin anew, whatever is there.
            anew: how to begin anew, for people.

        Raises:
            OutputError: there is an unfinished run, and it is to be neither resumed nor overwritten; or the folder cannot be
                written.
            RunInUseError: another process works in it.
            CheckpointError: the run depends on other things than it did, or its last checkpoint is damaged.
        """
        if self.path is None:
            return
        self.anew = anew
        if rank() > 0:
            wait()  # the first process checks the folder before the others
        self.take()
        try:
            self._open(identity, resume, overwrite, anew)
        except BaseException:
            self._give_back()
            raise

    def check_decision(self, resume: bool, overwrite: bool, anew: str) -> bool:
        """Whether there is an unfinished run; OutputError if it is to be neither resumed nor overwritten. See `open`."""
        there = any(self.path.glob("checkpoints*/step-*"))
        if rank() == 0 and there and not resume and not overwrite:
            raise OutputError(
                f"{str(self.path)!r} holds an unfinished run",
                expected="a decision",
                fix=f"--resume to go on with it, or {anew} to begin anew, or another --out",
            )
        return there

    def take(self) -> None:
        """Makes the folder the first process's own, until the run ends.

        Raises:
            RunInUseError: another process works in it.
            OutputError: it cannot be written.
        """
        if self.path is None or rank() > 0:
            return
        self._check_ours()
        try:
            self.owner = Ownership(self.path).take()
            if not (self.path / MARKER).is_file():
                mark(self.path, self.path.name)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def _check_ours(self) -> None:
        """Raises OutputError if what is at the run's place is no run's folder: it is left as it is."""
        if os.path.lexists(self.path) and not _is_ours(self.path):
            raise OutputError(
                f"{str(self.path)!r} is where the run would work, and mxdsurgery did not make it",
                expected="nothing there, or the folder of an unfinished run",
                fix="move it away, or give another --out",
            )

    def clear(self) -> None:
        """Removes what runs write into the folder, but for the owner's name; what others put there stays."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if not any(path.match(name) for name in _WRITTEN):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """While open, the folder is this process's own; runs in it begin and end meanwhile. Raises as `take`."""
        self.take()
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self.owner is not None:
            self.owner.give_back(beside=(MARKER,))
            self.owner = None

    def _open(self, identity: Mapping[str, Any], resume: bool, overwrite: bool, anew: str) -> None:
        found = self.checkpoints.latest(anew) if resume else None
        there = self.check_decision(resume, overwrite, anew)
        if found is not None:
            self.resumed, self.at = found, found.state["step"]
        self.confirm(**identity)
        try:
            if rank() == 0 and not (resume and there):
                self.clear()
            shutil.rmtree(self.scratch, ignore_errors=True)  # of a run that was killed
            self.scratch.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if rank() == 0:
            wait()
        self.journal = Journal(self.path if self.writes else None)

    def confirm(self, **identity: Any) -> None:
        """Adds what else the run depends on, and checks it against the checkpoint that is resumed.

        Raises:
            CheckpointError: the run that is to go on depends on something else.
        """
        identity = json.loads(json.dumps(identity))
        self.identity |= identity
        earlier = identity if self.resumed is None else self.resumed.state["identity"]
        other = [name for name, value in identity.items() if earlier.get(name) != value]
        if other:
            was = ", ".join(f"{name}: {shown(earlier.get(name), 60)}" for name in other)
            now = ", ".join(f"{name}: {shown(identity[name], 60)}" for name in other)
            raise CheckpointError(
                f"{str(self.path)!r} holds a run that depends on something else: {now}",
                expected=was,
                fix=f"repeat the earlier command, or begin anew: {self.anew}",
            )

    def keep_threads(self, count: int | None, say: Callable[[str], None]) -> None:
        """Computes on as many CPU threads as the run did before, unless a number was asked for.

        With another number, sums are rounded differently.

        Args:
            count: how many; None: an older version did not write it down.
            say: is told if this process had another number.
        """
        here = torch.get_num_threads()
        if count is None or count == here:
            return
        if asked_for() is not None:
            say(f"threads    {here}, as asked for; the run began with {count}, so sums are rounded differently from here on")
            return
        set_threads(count)
        say(f"threads    {count}, as the run began; here it would have been {here}")

    def check_text(self, digest: str) -> None:
        """Raises CheckpointError if the text read anew, up to where the run stood, is not what it was."""
        if digest != self.resumed.state["text"]:
            raise CheckpointError(
                f"the training text is not what it was when {str(self.resumed.folder)!r} was written",
                expected="the same text, up to where the run stood",
                fix=f"put the earlier text back, or begin anew: {self.anew}",
            )

    @contextmanager
    def watching(self, say: Callable[[str], None]) -> Iterator[None]:
        """While open, Ctrl-C and SIGTERM let a step end first; see `after`."""
        with stoppable(say) as self.stop:
            yield

    def after(self, step: int, files: Files, unchanging: Files, state: Callable[[], Mapping[str, Any]]) -> None:
        """To be called after each step, counted over the whole run: writes a checkpoint if one is due, and stops if asked to.

        Raises:
            Interrupted: the run was asked to stop.
            RunInUseError: another process has taken it over.
        """
        if self.owner is not None:
            self.owner.check()
        due = self.checkpoints is not None and self.checkpoints.due(step)
        due, asked = any_of([due, self.stop.asked], self.shares)
        if due or asked:
            self.save(step, files, unchanging, state())
        if asked:
            raise Interrupted(f"Interrupted. {self._left()}")

    def save(self, step: int, files: Files, unchanging: Files, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint, unless there is one of this step."""
        if self.checkpoints is None or self.checkpoints.keep == 0 or step <= self.at:
            return
        if not self.writes:
            for parts in files.values():
                for _ in parts():  # a collective operation: it merges what all processes know
                    pass
            self.at = step
            return
        if self.owner is not None:
            self.owner.check(now=True)
        own = {"step": step, "identity": self.identity, "threads": torch.get_num_threads(), "computes": self.computes}
        self.checkpoints.save(step, files, unchanging, own | dict(state))
        self.at = step

    def _left(self) -> str:
        """What a run that ends too soon leaves, for people; empties the folder if nothing was trained in it."""
        if not self.at:
            if self.owner is not None and not (self.path / METRICS_FILE).is_file():
                self.clear()
            return "Nothing was written: there was no checkpoint yet."
        return f"A checkpoint of step {self.at} is in {self.path}; the same command with --resume goes on from there."

    @contextmanager
    def working(self, reporter: Reporter) -> Iterator[Reporter]:
        """While open, the work is written to the journal; an error that ends it also says what there is to resume from.

        If it ends well, the folder is still this process's own, until `finish`.

        Raises:
            Interrupted: Ctrl-C.
            MxDError: as inside.
        """
        well = False
        try:
            with Recording(reporter, self.journal) as recording:
                if self.owner is not None and self.owner.before is not None:
                    recording.say(f"owner      {self.owner.before} is gone: its run is this one's now")
                if self.resumed is not None:
                    self.keep_threads(self.resumed.state.get("threads"), recording.say)
                yield recording
                well = True
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted. {self._left()}") from None
        except (DivergedError, CheckpointError, RunInUseError):
            raise  # a resumed run would end at the same point again; or another process goes on with it
        except MxDError as error:
            left = self._left()
            if not self.at:
                raise
            raise type(error)(error.found, expected=error.expected, fix=error.fix, left=left) from None
        finally:
            if self.scratch is not None and not (self.owner is not None and self.owner.lost):
                shutil.rmtree(self.scratch, ignore_errors=True)
            if not well:
                self._give_back()

    def finish(self, result: Path) -> None:
        """Adds the metrics to the result, and removes the folder."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            with open(result / METRICS_FILE, "ab") as metrics:
                metrics.write((self.path / METRICS_FILE).read_bytes())
        if self.owner is not None:
            self.clear()
        self._give_back()


def _is_ours(folder: Path) -> bool:
    """Whether a run made a folder: it has the marker; or, of an earlier version, an owner's name, a checkpoint or metrics."""
    if (folder / MARKER).is_file() or read_owner(folder) is not None:
        return True
    if not folder.is_dir():
        return False
    if all(path.name == OWNER_FILE or path.name.startswith(f".{OWNER_FILE}.") for path in folder.iterdir()):
        return True  # nothing is in it, or only the name of an owner that is being written, or was never finished
    if any(folder.glob("checkpoints*/step-*/manifest.json")):
        return True
    with contextlib.suppress(OSError), open(folder / METRICS_FILE, "rb") as metrics:
        return metrics.read(len(_METRICS)) == _METRICS and (folder / LOG_FILE).is_file()
    return False


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{str(path)!r} cannot be written: {first_line(error)}", fix="give another --out")


@dataclass(frozen=True)
class Keeper:
    """Connects a training with its run: it is told of each step, and holds what to resume from.

    Attributes:
        run: writes the checkpoints; None: nobody does.
        step: gives the present step of the whole run.
        state: gives where the run stands, as plain data.
        unchanging: files of what is finished.
        resumed: the tensors of the checkpoint that the training resumes from, as it gave them; None: it begins.
    """

    run: RunFolder | None = None
    step: Callable[[], int] = int
    state: Callable[[], Mapping[str, Any]] = dict
    unchanging: Files = field(default_factory=dict)
    resumed: Mapping[str, Tensor] | None = None

    def after(self, parts: Callable[[], Parts]) -> None:
        """To be called after a step; ``parts`` gives all that the training goes on from, and is called only if needed.

        Raises:
            Interrupted: the run was asked to stop.
        """
        if self.run is not None:
            self.run.after(self.step(), {TRAINING_FILE: parts}, self.unchanging, self.state)

    def finished(self, parts: Callable[[], Parts]) -> None:
        """To be called at the end: writes a checkpoint, since what follows, measuring and writing, may be interrupted too."""
        if self.run is not None:
            self.run.save(self.step(), {TRAINING_FILE: parts}, self.unchanging, self.state())


# For a training without checkpoints.
UNKEPT = Keeper()


def depends_on(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the keys and values of a recipe, or the like, those that a run depends on."""
    return {name: value for name, value in values.items() if name not in _FREE_KEYS}
