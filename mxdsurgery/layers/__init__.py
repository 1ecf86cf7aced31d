"""All files that travel with a checkpoint, and no others: torch and transformers only, relative imports.

Begin with `layer`, the Mixture-of-Decoders layer; `sparse` has its products, `interventions` is ``model.mxd``.
"""
