"""Everything that is known of every expert, as files, and looking it up.

`experts` writes the files from one run over a text; `files` reads them; `search` and `report` show what is in them.
"""
