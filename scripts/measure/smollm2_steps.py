"""The commands of docs/smollm2.md: every one that the tool has, on SmolLM2-135M-Instruct, in the order in which they run."""

from material import BOOKS
from steps import Step

MODEL, WHOLE, HEALED = "smollm2", "smollm2-mxd", "smollm2-healed"
_TEXTS = f"--data {BOOKS[0]} --eval-data {BOOKS[1]}"

STEPS = (
    Step("analyze", "## Every command\n\n### Before", f"mxdsurgery analyze {MODEL}", last=6),
    Step("plan", "", f"mxdsurgery plan {MODEL} --layers all --hours 1.5 {_TEXTS}", last=14),
    Step(
        "convert", "### Convert and heal", f"mxdsurgery convert {MODEL} --layers all {_TEXTS} --tokens 300k --eval-tokens 8k"
    ),
    Step("heal", "", f"mxdsurgery heal {WHOLE} --tokens 200k --out {HEALED}"),
)
