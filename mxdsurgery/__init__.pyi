"""The public names, for type checkers and editors; `__init__.py` loads each when it is first asked for."""

from mxdsurgery.base.analyze import Analysis as Analysis
from mxdsurgery.base.analyze import analyze as analyze
from mxdsurgery.base.families import Family as Family
from mxdsurgery.base.families import register_family as register_family
from mxdsurgery.catalogue.coefficients import coefficients as coefficients
from mxdsurgery.catalogue.experts import experts as experts
from mxdsurgery.catalogue.report import report as report
from mxdsurgery.catalogue.search import search as search
from mxdsurgery.checkpoint.apply import apply as apply
from mxdsurgery.checkpoint.apply import make_adapter as make_adapter
from mxdsurgery.checkpoint.converted import Converted as Converted
from mxdsurgery.checkpoint.converted import load as load
from mxdsurgery.conversion.convert import Conversion as Conversion
from mxdsurgery.conversion.convert import convert as convert
from mxdsurgery.conversion.frontier import frontier as frontier
from mxdsurgery.conversion.heal import heal as heal
from mxdsurgery.editing.edit import edit as edit
from mxdsurgery.editing.edits import Edits as Edits
from mxdsurgery.editing.edits import edits_from_flags as edits_from_flags
from mxdsurgery.editing.edits import read_edits as read_edits
from mxdsurgery.editing.effect import effect as effect
from mxdsurgery.editing.generate import generate as generate
from mxdsurgery.editing.steering import steering as steering
from mxdsurgery.editing.sweep import sweep as sweep
from mxdsurgery.errors import MxDError as MxDError
from mxdsurgery.layers.layer import Coefficients as Coefficients
from mxdsurgery.layers.layer import MxDLayer as MxDLayer
from mxdsurgery.measuring.dissect import dissect as dissect
from mxdsurgery.measuring.evaluate import evaluate as evaluate
from mxdsurgery.measuring.frontier_table import Frontier as Frontier
from mxdsurgery.measuring.growth import growth as growth
from mxdsurgery.measuring.probe import probe as probe
from mxdsurgery.planning.doctor import doctor as doctor
from mxdsurgery.planning.gpus import GpuHours as GpuHours
from mxdsurgery.planning.gpus import gpu_hours as gpu_hours
from mxdsurgery.planning.plan import Plan as Plan
from mxdsurgery.planning.plan import plan as plan
from mxdsurgery.planning.proposal import Proposal as Proposal
from mxdsurgery.planning.proposal import propose as propose
from mxdsurgery.recipe import Recipe as Recipe
from mxdsurgery.runs.plot import plot as plot
from mxdsurgery.sharing.push import push as push

__version__: str
