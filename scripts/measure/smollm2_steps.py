"""The commands of docs/smollm2.md on SmolLM2-135M-Instruct, in the order in which they run; experts.py has the others."""

from material import BOOKS
from steps import Step

MODEL, WHOLE, HEALED = "smollm2", "smollm2-mxd", "smollm2-healed"
_TEXTS = f"--data {BOOKS[0]} --eval-data {BOOKS[1]}"
_SHORT = "--tokens 100k --eval-tokens 4k"

STEPS = (
    Step("analyze", "### Before", f"mxdsurgery analyze {MODEL}", last=4),
    Step("plan", "", f"mxdsurgery plan {MODEL} --layers all --hours 1.5 {_TEXTS}", last=13),
    Step(
        "convert",
        "### All layers",
        f"mxdsurgery convert {MODEL} --layers all {_TEXTS} --tokens 300k --eval-tokens 8k",
        last=4,
    ),
    Step("heal", "", f"mxdsurgery heal {WHOLE} --tokens 100k --out {HEALED}", last=4),
    Step("evaluate", "", f"mxdsurgery evaluate {HEALED} --tokens 4k", first=3),
    Step(
        "convert-one",
        "### One layer",
        f"mxdsurgery convert {MODEL} --layers 15 {_TEXTS} {_SHORT} --format adapter --out layer15-adapter",
    ),
    Step("apply", "", "mxdsurgery apply layer15-adapter --out layer15"),
    Step("probe", "", "mxdsurgery probe layer15 --data ag_news.jsonl --samples 1000"),
    Step("dissect", "", "mxdsurgery dissect layer15 --data ag_news.jsonl --samples 500"),
    Step(
        "frontier",
        "",
        f"mxdsurgery frontier {MODEL} --layer 15 --kinds mxd,transcoder --k 32 {_TEXTS} {_SHORT} --out layer15-frontier",
    ),
    Step("plot", "", f"mxdsurgery plot {WHOLE}"),
)
