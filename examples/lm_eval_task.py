"""Scores a model and what it was converted to with lm-evaluation-harness, on tasks of one's own (pip install lm-eval).

    python examples/lm_eval_task.py demo-glu-mxd --original mxdsurgery/demo/demo-glu

The tasks are in the folder lm_eval_tasks: a YAML file each, and 40 beginnings of Python code with a right and a wrong
continuation. Nothing is downloaded. The harness loads the converted model as it does any that needs trust_remote_code; its own
command line does the same:

    lm_eval --model hf --model_args pretrained=demo-glu-mxd,dtype=float32,trust_remote_code=True \\
        --include_path examples/lm_eval_tasks --tasks python_pairs,python_bits --device cpu
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import lm_eval
except ImportError as error:
    print(f"this example needs lm-evaluation-harness: pip install lm-eval ({error})", file=sys.stderr)
    sys.exit(2)

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = {"python_pairs": "acc,none", "python_bits": "bits_per_byte,none"}  # and the score of each

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="what `mxdsurgery convert` wrote")
parser.add_argument("--original", help="the model it was made from; default: what the folder's config says")
parser.add_argument("--device", default="cpu")
parser.add_argument("--batch-size", type=int, default=8)
args = parser.parse_args()

config = json.loads((Path(args.folder) / "config.json").read_text(encoding="utf-8"))
# Only our own folder of tasks is read: the thousands that come with the harness would take a while.
tasks = TaskManager(include_path=str(Path(__file__).parent / "lm_eval_tasks"), include_defaults=False)


def scores(model: str, trusted: bool) -> dict:
    """What the harness finds, with `results` and `n-samples` by task."""
    loaded = HFLM(pretrained=model, dtype="float32", trust_remote_code=trusted, device=args.device, batch_size=args.batch_size)
    return lm_eval.simple_evaluate(loaded, tasks=list(TASKS), task_manager=tasks, log_samples=False, bootstrap_iters=0)


original = scores(args.original or config["mxd"]["base_model"], trusted=False)
converted = scores(args.folder, trusted=True)
print(f"{'task':<14}{'score':<16}{'examples':>10}{'original':>10}{'converted':>11}")
for task, score in TASKS.items():
    numbers = [found["results"][task][score] for found in (original, converted)]
    count = converted["n-samples"][task]["effective"]
    print(f"{task:<14}{score.split(',')[0]:<16}{count:>10}{numbers[0]:>10.3f}{numbers[1]:>11.3f}")
