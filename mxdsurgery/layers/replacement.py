"""What can stand where an MLP block was, and the model classes that hold it. Travels with every exported checkpoint.

Every kind of layer maps a block's input x (..., D) to its output (..., D). All but `DenseLayer` have a ``gate``, whose output
is the coefficients of N experts, which ``mixture`` turns into their sum s (..., D) by the layer's ``experts``; then
``y = s * m + r`` with ``m, r = dense_path(...)``.
"""

from torch import nn

from .baselines import Molt, SkipMap, SkipTranscoder, TopKSAE, Transcoder, Transforms
from .interventions import Interventions
from .layer import DenseLayer, Experts, Gate, MxDLayer

LAYER_KINDS: dict[str, type[nn.Module]] = {
    "mxd": MxDLayer,
    "transcoder": Transcoder,
    "skip-transcoder": SkipTranscoder,
    "topk-sae": TopKSAE,
    "molt": Molt,
    "dense": DenseLayer,
}


class MxDSurgeryMixin:
    """Makes a transformers model class into one whose chosen MLP blocks are other layers.

    Put before the family's own class: ``class MxDLlamaForCausalLM(MxDSurgeryMixin, LlamaForCausalLM)``. The config's
    ``mxd["layers"]`` says what stands where: ``path`` (relative to the base model) is the module that is replaced,
    ``bypass`` the modules beside it that become identities, ``kind`` what is put there and ``shape`` its arguments.
    """

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        for entry in config.mxd["layers"]:
            for path in entry["bypass"]:
                self.base_model.set_submodule(path, nn.Identity())
            layer = LAYER_KINDS[entry.get("kind", "mxd")](**entry["shape"])
            self.base_model.set_submodule(entry["path"], layer)

    @property
    def mxd(self) -> Interventions:
        """Changes to its experts while it runs: ``with model.mxd.ablate({12: [4031]}): ...``."""
        return Interventions(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the family's own class is custom code.

        Where this is True, transformers does not initialise modules without parameters of their own, which leaves out weights
        that the family's class initialises from a parent module.
        """
        return next(base for base in cls.__mro__[1:] if not issubclass(base, MxDSurgeryMixin)).is_custom_code()

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights for a model made from a config. What a checkpoint has loaded is not touched."""
        if not isinstance(module, (Gate, Experts, Transforms, SkipMap, *LAYER_KINDS.values())):
            super()._init_weights(module)
        elif not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
            module.reset_parameters()
