"""Base models with code of their own, as people publish them: folders for the tests."""

import json

import torch
from safetensors.torch import save_file

from mxdsurgery.base.model import load_tokenizer

_CONFIG = """from transformers import PretrainedConfig


class ToyConfig(PretrainedConfig):
    model_type = "toy-lm"
    {names}

    def __init__(self, n_layer=2, n_embd=16, vocab_size=4096, **kwargs):
        self.n_layer, self.n_embd, self.vocab_size = n_layer, n_embd, vocab_size
        super().__init__(**kwargs)
"""
_NAMES = 'attribute_map = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd"}'
_MODELING = """import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
{first}

from .configuration_toy import ToyConfig


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x):
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.mlp(self.norm(x + mean))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.GELU()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Toy(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "{prefix}"

    def _init_weights(self, module):
        pass


class ToyModel(Toy):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList([Block(config.n_embd) for _ in range(config.n_layer)])
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, {takes}):
        x = self.wte({first_taken})
        for block in self.h:
            x = block(x)
        return {body_returns}


class ToyForCausalLM({bases}):
    {tied}

    def __init__(self, config):
        super().__init__(config)
        {parts}
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte if hasattr(self, "wte") else self.model.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, {takes}):
        {forward}
        logits = self.lm_head(x)
        return {returns}
"""


def own_code_folder(
    folder,
    names=_NAMES,
    first="",
    tied="",
    takes="input_ids, **kwargs",
    body_returns="(x,)",
    returns="CausalLMOutput(logits=logits)",
    flat=False,
):
    """Writes a model of two layers, 16 wide, whose code is a variation of the same; returns its path as text.

    Args:
        folder: to write.
        names: what its config says of the names of sizes; default: transformers' names for its own.
        first: a line at the beginning of its modeling file.
        tied: a line in its class.
        takes: the arguments of its forward.
        body_returns: what its base model returns.
        returns: what its forward returns.
        flat: its class runs the decoder layers itself, has no base model, and cannot generate.
    """
    folder.mkdir(parents=True)
    load_tokenizer("demo-glu").save_pretrained(folder)
    given = takes.split(",")[0]
    run = f"x = self.wte({given})\n        for block in self.h:\n            x = block(x)"
    taken = f"output = self.model({given})\n        x = output if isinstance(output, torch.Tensor) else output[0]"
    (folder / "configuration_toy.py").write_text(_CONFIG.replace("{names}", names))
    values = {
        "first": first,
        "prefix": "" if flat else "model",
        "takes": takes,
        "first_taken": given,
        "body_returns": body_returns,
        "bases": "Toy" if flat else "Toy, GenerationMixin",
        "tied": tied,
        "parts": "self.wte, self.h = (inner := ToyModel(config)).wte, inner.h" if flat else "self.model = ToyModel(config)",
        "forward": run if flat else taken,
        "returns": returns,
    }
    modeling = _MODELING
    for name, value in values.items():
        modeling = modeling.replace(f"{{{name}}}", value)
    (folder / "modeling_toy.py").write_text(modeling)
    code = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    config = {"model_type": "toy-lm", "architectures": ["ToyForCausalLM"], "auto_map": code, "dtype": "float32"}
    config |= {"n_layer": 2, "n_embd": 16, "vocab_size": 4096, "tie_word_embeddings": bool(tied)}
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    prefix = "" if flat else "model."
    shapes = {f"{prefix}wte.weight": (4096, 16), "lm_head.weight": (4096, 16)}
    for layer in range(2):
        here = f"{prefix}h.{layer}."
        shapes |= {f"{here}norm.weight": (16,), f"{here}norm.bias": (16,)}
        shapes |= {f"{here}mlp.up.weight": (64, 16), f"{here}mlp.up.bias": (64,)}
        shapes |= {f"{here}mlp.down.weight": (16, 64), f"{here}mlp.down.bias": (16,)}
    weights = {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
