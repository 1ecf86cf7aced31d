"""What this machine has and can: devices, threads, free memory, and what it computes in fastest.

`device` says what a name like ``auto`` means; `compute` chooses a dtype by timing. Nothing here knows of models.
"""
