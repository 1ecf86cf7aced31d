"""The verbs that train: ``convert``, ``heal`` and ``frontier``.

Begin with `convert`; `train` runs over the text once for each group of layers.
"""
