"""How to heal: the settings of `heal`."""

import dataclasses
from dataclasses import dataclass

from mxdsurgery.arguments import given_number
from mxdsurgery.choices import HEAL_CHOICES, LOCAL, LR_FACTOR, SPECIALISE_FACTOR
from mxdsurgery.errors import HealError
from mxdsurgery.recipe import CHECKPOINT_KEYS, Recipe
from mxdsurgery.training.end_to_end import Settings

# Share of the steps until the learning rate peaks; from there it falls. Adam's first steps move all weights equally far, good
# or not.
WARMUP = 0.2


@dataclass(frozen=True)
class Healing:
    """How to heal. Each is a keyword of `heal` and a flag of the command.

    Attributes:
        mode: what learns: ``mxd``, the new layers; ``lora``, adapters on the attention projections; or ``both``.
        tokens: of training; default: the recipe's.
        data: the text; default: the recipe's.
        text_column: column or field with the text; default: the recipe's.
        lr: peak learning rate of Adam; default: ``LR_FACTOR`` times the recipe's.
        moments: dtype of Adam's moments of the new layers; default: the recipe's.
        batch: tokens per optimiser step; default: the recipe's.
        accumulate: forward and backward passes that a step is split into.
        checkpointing: compute the inside of each decoder layer twice, and keep less in memory.
        specialise: weight of the penalty on what frozen experts could do; default: ``SPECIALISE_FACTOR`` times the recipe's.
            Where that asks for a share, no such penalty: what the experts of each layer carry is held at what it is.
        local: weight of each layer's own distance from its block's output; default: ``LOCAL``, or 0 with a cached teacher.
        patience: stop after so many validations in a row without a new best, in the second half of the steps; there are 10
            in all.
        lora_rank: of the adapters.
        lora: ``merged`` into the weights, or kept as an ``adapter`` for PEFT in the folder ``lora``.
        teacher: ``model``: the original runs beside the one in training. ``cached``: it runs once, its ``top_n`` likeliest
            tokens at each position are kept on disk, and it is unloaded.
        top_n: see ``teacher``.
        seed: of the text's order and the adapters; default: one more than the recipe's.
        format: ``checkpoint``, or ``adapter``: only what differs from the base model.
        checkpoint_every: as in a recipe, like the next two; default: the recipe's.
        checkpoint_minutes: see there.
        keep_checkpoints: see there.
    """

    mode: str = "mxd"
    tokens: int | None = None
    data: str | None = None
    text_column: str | None = None
    lr: float | None = None
    moments: str | None = None
    batch: int | None = None
    accumulate: int = 1
    checkpointing: bool = False
    specialise: float | None = None
    local: float | None = None
    patience: int = 4
    lora_rank: int = 8
    lora: str = "merged"
    teacher: str = "model"
    top_n: int = 64
    seed: int | None = None
    format: str = "checkpoint"
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    keep_checkpoints: int | None = None

    def __post_init__(self) -> None:
        for name, choices in HEAL_CHOICES.items():
            if getattr(self, name) not in choices:
                raise HealError(f"{name} is {getattr(self, name)!r}", expected="one of " + ", ".join(choices))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, given_number(field.name, getattr(self, field.name), HealError))
        if self.local is None:
            object.__setattr__(self, "local", LOCAL if self.teacher == "model" else 0.0)
        if self.local > 0 and self.teacher == "cached":
            raise HealError(
                "local is above 0 and the teacher is 'cached'",
                expected="teacher 'model': what the original's blocks give is not kept",
                fix="--local 0, or --teacher model",
            )

    def settings(self, saved: Recipe) -> Settings:
        """How to train end to end what a recipe gave."""
        keeps_shares = self._keeps_shares(saved)
        return Settings(self.local, self.accumulate, self.checkpointing, patience=self.patience, keeps_shares=keeps_shares)

    def _keeps_shares(self, saved: Recipe) -> bool:
        """Whether what the experts carry is held: they were trained for a share, and no other penalty is asked for."""
        return self.specialise is None and saved.share_target is not None

    @property
    def adapts(self) -> bool:
        """Whether there are adapters."""
        return self.mode != "mxd"

    def recipe(self, saved: Recipe) -> Recipe:
        """The recipe with these settings.

        Raises:
            RecipeError: a value out of range.
        """
        names = ("text_column", "tokens", "lr", "moments", "batch", "specialise", "seed", *CHECKPOINT_KEYS)
        given = {name: getattr(self, name) for name in names}
        defaults = {"lr": LR_FACTOR * saved.lr, "seed": (saved.seed + 1) % 2**32}
        defaults |= {"warmup": WARMUP, "decay": 1.0 - WARMUP, "parallel": "data"}
        weight = 0.0 if self._keeps_shares(saved) else SPECIALISE_FACTOR * saved.penalty
        defaults |= {"specialise": min(10.0, weight), "expert_share": None}
        return dataclasses.replace(saved, **defaults | {name: value for name, value in given.items() if value is not None})
