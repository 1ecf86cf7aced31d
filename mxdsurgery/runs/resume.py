"""Checkpoints that training goes on from as if nothing had happened, and what goes into them.

A checkpoint is a folder that is written under another name, synced to disk and renamed: whatever ends the process, it is
there whole or not at all. Its manifest has every file's size and SHA-256; a checkpoint that differs from it is refused.
What a training goes on from is in several files, a layer in each: one at a time is in the host's memory when they are written,
and what is resumed from is read tensor by tensor.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxdsurgery.aside import sync
from mxdsurgery.base.digest import file_digest
from mxdsurgery.errors import CheckpointError, OutputError, first_line

# The version of checkpoints that is written. Version 1 had one file where there are now several.
CHECKPOINT_VERSION = 2
_READ_VERSIONS = (1, 2)
_MANIFEST, _STATE, _ASIDE = "manifest.json", "state.json", ".writing"
# Writing checkpoints never takes more than this share of the time, unless a number of steps is asked for.
_LARGEST_SHARE = 0.05

# Tensors part by part: what is written after another is not held with it. No name is in two parts.
Parts = Iterable[Mapping[str, Tensor]]
# By the name of what a checkpoint holds, what gives its tensors; called when they are written. The first part is in the file
# of that name, and each other has a number before the suffix.
Files = dict[str, Callable[[], Parts]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole.

    Attributes:
        folder: where it lies.
        state: plain data.
    """

    folder: Path
    state: dict[str, Any]

    def tensors(self, file: str) -> "Stored":
        """The tensors of what was saved under a name, each read when it is asked for."""
        return Stored(_files_of(self.folder, file))


class Stored(Mapping[str, Tensor]):
    """Tensors in files, by name; on the CPU. Each is read when it is asked for, and not kept."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.places: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as opened:
                self.places |= dict.fromkeys(opened.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.places[name], "pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: where they lie; made with the first of them.
        every: steps between two; None: by time alone.
        minutes: minutes between two, where ``every`` asks for none sooner.
        keep: how many stay; 0: none is ever written.
    """

    def __init__(self, folder: Path, *, every: int | None, minutes: float, keep: int) -> None:
        self.folder, self.every, self.minutes, self.keep = folder, every, minutes, keep
        self.last, self.took = time.monotonic(), 0.0

    def due(self, step: int) -> bool:
        """Whether one should be written after this step."""
        if self.keep == 0:
            return False
        if self.every is not None and step % self.every == 0:
            return True
        return time.monotonic() - self.last > max(60.0 * self.minutes, self.took / _LARGEST_SHARE)

    def save(self, step: int, files: Files, unchanging: Files, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint, and deletes the oldest ones.

        Args:
            step: the step that the run has reached, later than those of all other checkpoints.
            files: by name, what gives their tensors.
            unchanging: the same, of files that do not change: they are taken from the checkpoint before, where it has them.
            state: plain data.

        Raises:
            OutputError: it cannot be written; those before it are as they were.
        """
        start, before, aside = time.monotonic(), self._newest(), self.folder / _ASIDE
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            aside.mkdir(parents=True)
            for name, parts in (files | unchanging).items():
                if name in unchanging and before is not None and (before / name).is_file():
                    for path in _files_of(before, name):
                        _link(path, aside / path.name)
                else:
                    _write(parts(), aside / name)
            (aside / _STATE).write_text(json.dumps(state), encoding="utf-8")
            written = {path.name: _described(path) for path in sorted(aside.iterdir())}
            manifest = {"format_version": CHECKPOINT_VERSION, "step": step, "files": written}
            (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                sync(path)
            os.replace(aside, self.folder / f"step-{step:09}")
            sync(self.folder)
            for old in self._all()[: -self.keep]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OutputError(
                f"the checkpoint of step {step} cannot be written to {str(self.folder)!r}: {first_line(error)}",
                expected="room for it",
                fix="free some space, or keep fewer of them: --keep-checkpoints 1",
            ) from None
        self.last, self.took = time.monotonic(), time.monotonic() - start

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._all())

    def latest(self, anew: str = "--overwrite") -> Checkpoint | None:
        """The newest checkpoint; None where there is none.

        Args:
            anew: how to begin anew, for people.

        Raises:
            CheckpointError: it is not as it was written, or of a version that this one does not know.
        """
        path = self._newest()
        if path is None:
            return None
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            version, files = manifest["format_version"], manifest["files"]
            if version not in _READ_VERSIONS:
                raise CheckpointError(
                    f"{str(path)!r} is of checkpoint version {version!r}",
                    expected="version " + " or ".join(map(str, _READ_VERSIONS)),
                    fix=f"go on with the version of mxdsurgery that wrote it, or begin anew: {anew}",
                )
            missing = [name for name in files if not (path / name).is_file()]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
            wrong = [name for name, entry in files.items() if _described(path / name) != entry]
            if wrong or _STATE not in files:
                raise ValueError(f"{wrong[0] if wrong else _STATE} is not as it was written")
            return Checkpoint(path, json.loads((path / _STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            others = [other.name for other in self._all() if other != path]
            then = f"goes on from {others[-1]}" if others else "begins anew: there is none before it"
            reason = f"{_MANIFEST}: {error.strerror}" if isinstance(error, OSError) else first_line(error)
            raise CheckpointError(
                f"the checkpoint {str(path)!r} is damaged: {reason}",
                expected="the files of its manifest, with their sizes and digests",
                fix=f"delete it; the same command with --resume then {then}",
            ) from None

    def _all(self) -> list[Path]:
        """The checkpoints' folders, from the oldest to the newest."""
        return sorted(self.folder.glob("step-*"), key=lambda path: path.name)

    def _newest(self) -> Path | None:
        return next(reversed(self._all()), None)


def _write(parts: Parts, first: Path) -> None:
    """Writes each part to a file of its own, the first even if there is none, and frees it."""
    count = 0
    for tensors in parts:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, _numbered(first, count))
        del tensors
        count += 1
    if count == 0:
        save_file({}, first)


def _numbered(first: Path, number: int) -> Path:
    return first.with_suffix(f".{number}{first.suffix}") if number else first


def _files_of(folder: Path, name: str) -> list[Path]:
    """The files of what was saved under a name, in order."""
    numbered = (_numbered(folder / name, number) for number in itertools.count())
    return list(itertools.takewhile(Path.is_file, numbered))


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that an optimiser keeps for its parameters, by parameter number and name: ``0.exp_avg``."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, kept in state.items() for name, value in kept.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimiser back what `optimizer_state` took."""
    kept: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, what = name.partition(".")
        kept.setdefault(int(number), {})[what] = value.clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix.``, by the rest of the name."""
    return {name[len(prefix) + 1 :]: tensors[name] for name in tensors if name.startswith(prefix + ".")}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same under longer names; `part` takes them out again."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
