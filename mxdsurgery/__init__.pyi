"""The public names, for type checkers and editors; `__init__.py` loads each when it is first asked for."""

from mxdsurgery.analyze import Analysis as Analysis
from mxdsurgery.analyze import analyze as analyze
from mxdsurgery.apply import apply as apply
from mxdsurgery.apply import make_adapter as make_adapter
from mxdsurgery.checkpoint import Converted as Converted
from mxdsurgery.checkpoint import load as load
from mxdsurgery.coefficients import coefficients as coefficients
from mxdsurgery.comparison import Frontier as Frontier
from mxdsurgery.convert import Conversion as Conversion
from mxdsurgery.convert import convert as convert
from mxdsurgery.dissect import dissect as dissect
from mxdsurgery.edit import edit as edit
from mxdsurgery.edits import Edits as Edits
from mxdsurgery.edits import edits_from_flags as edits_from_flags
from mxdsurgery.edits import read_edits as read_edits
from mxdsurgery.effect import effect as effect
from mxdsurgery.errors import MxDError as MxDError
from mxdsurgery.evaluate import evaluate as evaluate
from mxdsurgery.experts import experts as experts
from mxdsurgery.families import Family as Family
from mxdsurgery.families import register_family as register_family
from mxdsurgery.frontier import frontier as frontier
from mxdsurgery.generate import generate as generate
from mxdsurgery.growth import growth as growth
from mxdsurgery.heal import heal as heal
from mxdsurgery.layer import Coefficients as Coefficients
from mxdsurgery.layer import MxDLayer as MxDLayer
from mxdsurgery.plan import Plan as Plan
from mxdsurgery.plan import plan as plan
from mxdsurgery.plot import plot as plot
from mxdsurgery.probe import probe as probe
from mxdsurgery.push import push as push
from mxdsurgery.recipe import Recipe as Recipe
from mxdsurgery.report import report as report
from mxdsurgery.search import search as search
from mxdsurgery.steering import steering as steering
from mxdsurgery.sweep import sweep as sweep

__version__: str
