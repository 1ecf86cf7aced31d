"""Text: from files, data sets and labels to packed contexts of token ids. It knows tokenizers, and no model.

Begin with `sources`. `places` says which files a text is, `forms` what they hold and `fields` where in a row the text is;
`packing` makes contexts of documents.
"""
