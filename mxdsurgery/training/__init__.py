"""How layers learn, on what device, and what that costs by arithmetic.

Begin with `distill`, one layer from its block; `end_to_end` trains all of them together; `inputs` feeds them.
"""
