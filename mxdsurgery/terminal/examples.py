"""What people do with each command, as its help shows it: the arguments, without ``mxdsurgery`` and the command's name."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "analyze": ("meta-llama/Llama-3.2-3B",),
    "doctor": ("", "--json"),
    "plan": ("meta-llama/Llama-3.2-3B --layers all", "org/model --hours 3", "meta-llama/Llama-3.2-3B --layers all --gpu h100"),
    "plot": ("model-mxd",),
    "convert": (
        "demo-glu --layers all",
        "org/model --layers 4-7 --tokens 2M --data texts/ --eval-data heldout.txt",
        "org/model --layers all --resume",
    ),
    "heal": ("model-mxd --out model-healed --tokens 300k",),
    "frontier": ("org/model --layer 12 --k 16,64 --kinds mxd,transcoder --out frontier",),
    "evaluate": ("model-mxd", "model-mxd --growth"),
    "probe": ("model-mxd --data imdb --label-column label",),
    "dissect": ("model-mxd --data imdb",),
    "experts": ("model-mxd --tokens 500k",),
    "search": ("model-mxd", "model-mxd ' king'", "model-mxd python --by class"),
    "report": ("model-mxd --out report.html",),
    "effect": ("model-mxd --ablate 12:4031", "model-mxd --sweep 12"),
    "coefficients": ("model-mxd --tokens 5k --out coefficients",),
    "generate": (
        "model-mxd --prompt 'Once upon a time' --steer 12:4031=2 --unit maximum",
        "model-mxd --steer 12:4031=2 --unit maximum --score",
    ),
    "edit": ("model-mxd --ablate 12:4031 --out edited", "edited --undo --out restored"),
    "push": ("model-mxd user/model-mxd --private",),
    "apply": ("adapter --out model-mxd",),
}
