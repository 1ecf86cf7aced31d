"""How long work survives, and in how many processes it works.

`run_folder` is where a run works until its result is there; `resume` keeps checkpoints, `journal` what happened.
"""
