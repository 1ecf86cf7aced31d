"""The converted model's folder: written, checked, read back, and turned into an adapter of its base model.

`export` writes the folder; `converted` reads it without running code from it.
"""
