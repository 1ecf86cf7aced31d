"""What a conversion cost, against the original model, and what single experts stand for.

Begin with `fidelity`, every figure of an evaluation; `intervals` how sure they are.
"""
