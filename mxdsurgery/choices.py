"""Choices and defaults of flags where no recipe key has them: plain data, so that help needs no torch."""

from mxdsurgery.recipe import RECIPE_KEYS

# `frontier`
DEFAULT_K = (16, 32, 64, 128, 256)
DEFAULT_KINDS = ("mxd", "transcoder", "skip-transcoder")
# Each layer is converted alone, so no others feed it.
ONE_LAYER = {
    "inputs": "original",
    "target": "stream",
    "kept_tokens": None,
    "offload": "none",
    "format": "checkpoint",
    "eval_tokens_single": None,
}

# `heal`; the first is the default.
HEAL_CHOICES = {
    "mode": ("mxd", "lora", "both"),
    "lora": ("merged", "adapter"),
    "teacher": ("model", "cached"),
    "format": RECIPE_KEYS["format"].choices,
}
# The peak learning rate, as a share of that of the conversion: a higher one spoils a good start before it heals.
LR_FACTOR = 0.5
# The weight of the penalty on frozen experts, as a multiple of the recipe's: with less, the experts' share falls with the KL.
SPECIALISE_FACTOR = 10.0
# The weight of each layer's own distance from its block's output, beside the KL's 1.
LOCAL = 0.3

# `search`: what is looked for.
BY = ("auto", "token", "text", "class")
# `coefficients`
FORMS = ("parquet", "safetensors")
# `generate`: units of the numbers of ``steer`` and ``clamp``. Repeats interventions.py, which travels and cannot import this.
UNITS = ("coefficient", "maximum")
