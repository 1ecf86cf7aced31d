"""What the scripts measure on: models and texts of the shared folder (CONTRIBUTING.md says where that is)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

# Text to train on, and held-out text.
BOOKS = ("train.jsonl.gz", "heldout.jsonl.gz")
STORIES = ("tinystories-train.txt", "tinystories-heldout.txt")

# Steps and rate of the trainings that are compared with each other on most pages; K falls, and the penalty's weight is fixed.
STEPS = {"batch": 2048, "lr": 2e-3}
FIXED = STEPS | {"specialise": 0.003}

shared_option = click.option(
    "--shared",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with models/, text/ and probing/.",
)


only_option = click.option("--only", help="Only models whose name contains this.")


def runs_option(name: str) -> Callable[[Callable], Callable]:
    """Where what is trained stays, to be used again."""
    return click.option("--runs", type=click.Path(path_type=Path), default=Path("runs") / name, show_default=True)


@dataclass(frozen=True)
class Subject:
    """A model, its texts, and how many held-out tokens it is measured on."""

    model: str
    data: str
    eval_data: str
    eval_tokens: int

    def paths(self, shared: Path) -> dict[str, str]:
        """As `convert` and others take them."""
        text = shared / "text"
        model = str(shared / "models" / self.model)
        return {"model": model, "data": str(text / self.data), "eval_data": str(text / self.eval_data)}
