"""What flags may be, and are by default, where no recipe key says so: plain data, so that help is there without torch."""

from mxdsurgery.recipe import RECIPE_KEYS

# `frontier`
DEFAULT_K = (16, 32, 64, 128, 256)
DEFAULT_KINDS = ("mxd", "transcoder", "skip-transcoder")
# One layer at a time is looked at, so there are no others to feed it.
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
# The peak learning rate, as a share of that of the conversion: more spoils a good start before it heals.
LR_FACTOR = 0.1
# The weight of the penalty on frozen experts, of the recipe's: with less, their share falls while the KL does.
SPECIALISE_FACTOR = 10.0
# The weight of each layer's own distance from its block's output, beside the KL's 1.
LOCAL = 0.3

# `search`: what is looked for.
BY = ("auto", "token", "text")
# `coefficients`
FORMS = ("parquet", "safetensors")
# `generate`: of the numbers of ``steer`` and ``clamp``. As in interventions.py, which travels and so imports nothing of this.
UNITS = ("coefficient", "maximum")
