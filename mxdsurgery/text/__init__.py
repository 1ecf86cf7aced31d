"""Text: from files, data sets and labels to packed contexts of token ids. It knows tokenizers, and no model.

Begin with `sources`; `packing` makes contexts of documents.
"""
