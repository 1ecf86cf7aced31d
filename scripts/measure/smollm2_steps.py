"""The commands of docs/smollm2.md on SmolLM2-135M-Instruct, in the order in which they run."""

from material import BOOKS
from steps import SAMPLING, Step

MODEL, WHOLE, HEALED = "smollm2", "smollm2-mxd", "smollm2-healed"
_TEXTS = f"--data {BOOKS[0]} --eval-data {BOOKS[1]}"
CODE, STEERED = "28:7096", "5:1427"
_SHORT = "--tokens 100k --eval-tokens 4k"


def _chat(steer: str) -> str:
    """An answer with experts steered, in units of their maxima."""
    return (
        f"mxdsurgery generate {HEALED} --chat --prompt 'Tell me about the sea.' --steer {steer} --unit maximum "
        "--max-new-tokens 40 --temperature 0"
    )


STEPS = (
    Step("analyze", "### Before", f"mxdsurgery analyze {MODEL}", last=4),
    Step("plan", "", f"mxdsurgery plan {MODEL} --layers all --hours 1.5 {_TEXTS}", last=13),
    Step(
        "convert",
        "### All layers\n\nWith other jobs beside it and beside `heal`.",
        f"mxdsurgery convert {MODEL} --layers all {_TEXTS} --tokens 300k --eval-tokens 8k",
        last=4,
    ),
    Step("heal", "Interrupted and resumed once:", f"mxdsurgery heal {WHOLE} --tokens 60k --out {HEALED}", first=14),
    Step("evaluate", "", f"mxdsurgery evaluate {HEALED}", first=3),
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

# What users do with the experts; `CODE` and `STEERED` were found with `search`.
EXPERT_STEPS = (
    Step(
        "experts",
        "### Find experts\n\nOne pass over the text for all layers. The text has a field `kind`, so kinds are counted, too.",
        f"mxdsurgery experts {HEALED} --data {BOOKS[0]} --tokens 50k --overwrite",
    ),
    Step(
        "bench",
        "What that costs, against a bare forward pass (no language-model head) over the same tokens in the same run:",
        f"python scripts/measure/bench_experts.py {HEALED} --data {BOOKS[0]} --tokens 20000",
    ),
    Step(
        "search",
        "Which experts does a reader understand at once? Of each token, the one that it tells most about:",
        f"mxdsurgery search {HEALED} --top 20",
    ),
    Step("search-class", "Which fire on one kind of text?", f"mxdsurgery search {HEALED} python --by class --top 10"),
    Step(
        "search-text",
        "Which experts know what follows? By example text:",
        f"mxdsurgery search {HEALED} 'def __init__(self, name):' --top 10",
    ),
    Step("search-token", "By token:", f"mxdsurgery search {HEALED} ' king' --top 10"),
    Step(
        "report",
        "### Look\n\nOne page that opens from disk, without server or network, with all experts to browse and to search.\n\n"
        "![The report: an expert and the places where it fires](smollm2/report.png)",
        f"mxdsurgery report {HEALED}",
    ),
    Step(
        "bench-report",
        "How quick it is, in Chromium:",
        f"python scripts/measure/bench_report.py {HEALED}/report.html --search king --shows {STEERED} --picture report.png",
    ),
    Step(
        "effect",
        "### What does an expert do?\n\nAblated, beside five experts that fire as often "
        "([single-experts.md](single-experts.md) has it for many experts, at several shares, beside transcoders and molts):",
        f"mxdsurgery effect {HEALED} --ablate {CODE} --tokens 4k --top 6",
    ),
    Step(
        "sweep",
        "All experts of a layer by what ablating each alone does, exactly, in one batched pass:",
        f"mxdsurgery effect {HEALED} --sweep 29 --tokens 1k --contexts-per-expert 1 --top 10",
    ),
    Step(
        "chat",
        "### Steer\n\nThe likeliest text with and without an expert that fires on ` Mr`, at twice its "
        "maximum; it changes nothing here:",
        _chat(f"{STEERED}=2"),
    ),
    Step(
        "chat-code",
        "Experts of Python code in three layers, at twice their maxima: another answer, and no code. At six times, the text "
        "breaks before it turns into code:",
        _chat("16:5614=2,24:4322=2,28:7096=2"),
    ),
    Step("chat-broken", "", _chat("16:5614=6,24:4322=6,28:7096=6")),
    Step(
        "score",
        "How far do samples move towards what the expert stands for, beside steering other experts as strongly, and are they "
        "still fluent? [Does share buy control?](single-experts.md) says what of that depends on the share that the experts "
        "carry, and what a transcoder's feature does.",
        f"mxdsurgery generate {HEALED} --steer {STEERED}=2 --unit maximum --factors 0.5,1,2 --samples 20 {SAMPLING} --score",
    ),
    Step(
        "edit",
        "### Edit for good\n\nInto the weights, and what that changed:",
        f"mxdsurgery edit {HEALED} --ablate {CODE} --scale {STEERED}=2 --out edited --overwrite",
    ),
    Step("undo", "And back, bit for bit:", "mxdsurgery edit edited --undo --out restored --overwrite"),
    Step(
        "same",
        "",
        f"diff -r --exclude=experts --exclude=report.html --exclude=effects {HEALED} restored && echo identical",
    ),
    Step(
        "refused",
        "What cannot be is refused by name, and nothing is written:",
        f"mxdsurgery edit {HEALED} --ablate 5:99999 --out nowhere",
    ),
    Step(
        "erase",
        "### Erase a capability\n\n`examples/erase_capability.py` removes the experts of Python code, and as many random "
        "ones that fire as often. How many experts it takes, and what that costs elsewhere, depends on their share "
        "([single-experts.md](single-experts.md)).",
        f"python examples/erase_capability.py {HEALED} --kind python --data {BOOKS[1]} --experts 100,1000,10000 "
        "--tokens 8000 --random 2",
    ),
    Step(
        "hooks",
        "### With other tools\n\nPlain PyTorch hooks, on a model that plain transformers has loaded:",
        f"python examples/hooks.py {HEALED} --layer 15",
    ),
    Step(
        "coefficients",
        "All coefficients on a text as Parquet or safetensors; `mxdsurgery/catalogue/coefficients.py` documents the layout:",
        f"mxdsurgery coefficients {HEALED} --tokens 5k --out coefficients",
    ),
)
