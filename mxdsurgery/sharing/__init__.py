"""What leaves this machine: which files, whole, and without secrets or local paths.

`push` is the command; `contents` chooses the files and searches them.
"""
