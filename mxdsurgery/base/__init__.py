"""The model that is operated on: finding and loading it, its MLP blocks, what goes through them, and replacing them.

Begin with `model` and `blocks`; `finding` and `proof` say which block a layer holds, and prove it.
"""
