"""The converted model's folder: written, checked, read back, and as an adapter of its base model.

`export` writes it; `converted` reads it without running code from it.
"""
