"""What travels with a checkpoint, all of it and nothing else: torch and transformers only, relative imports.

Begin with `layer`, the Mixture-of-Decoders layer; `sparse` has its products, `interventions` is ``model.mxd``.
"""
