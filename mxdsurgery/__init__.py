"""mxdsurgery: language models with Mixture-of-Decoders layers in place of their MLP blocks.

The public functions are named as the commands: `analyze`, `plan`, `convert`, `heal`, `evaluate`, ...; `load` reads a converted
folder, `MxDLayer` is the layer, `MxDError` the base of all named errors.
"""

import os

# On Linux, torch then asks for huge pages: the CPU's training step spends a tenth of its time on page faults otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# The order matters: a function takes the place of the module that it is named after.
from mxdsurgery.analyze import Analysis, analyze
from mxdsurgery.apply import apply, make_adapter
from mxdsurgery.checkpoint import Converted, load
from mxdsurgery.coefficients import coefficients
from mxdsurgery.comparison import Frontier
from mxdsurgery.convert import Conversion, convert
from mxdsurgery.dissect import dissect
from mxdsurgery.edit import edit
from mxdsurgery.edits import Edits, edits_from_flags, read_edits
from mxdsurgery.effect import effect
from mxdsurgery.errors import MxDError
from mxdsurgery.evaluate import evaluate
from mxdsurgery.experts import experts
from mxdsurgery.families import Family, register_family
from mxdsurgery.frontier import frontier
from mxdsurgery.generate import generate
from mxdsurgery.growth import growth
from mxdsurgery.heal import heal
from mxdsurgery.layer import Coefficients, MxDLayer
from mxdsurgery.plan import Plan, plan
from mxdsurgery.plot import plot
from mxdsurgery.probe import probe
from mxdsurgery.push import push
from mxdsurgery.recipe import Recipe
from mxdsurgery.report import report
from mxdsurgery.search import search
from mxdsurgery.steering import steering
from mxdsurgery.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "Coefficients",
    "Conversion",
    "Converted",
    "Edits",
    "Family",
    "Frontier",
    "MxDError",
    "MxDLayer",
    "Plan",
    "Recipe",
    "analyze",
    "apply",
    "coefficients",
    "convert",
    "dissect",
    "edit",
    "edits_from_flags",
    "effect",
    "evaluate",
    "experts",
    "frontier",
    "generate",
    "growth",
    "heal",
    "load",
    "make_adapter",
    "plan",
    "plot",
    "probe",
    "push",
    "read_edits",
    "register_family",
    "report",
    "search",
    "steering",
    "sweep",
]
