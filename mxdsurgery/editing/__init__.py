"""Changing experts, and what that does: live, in the weights, to predictions and to generated text.

Begin with `edits`; `edit` puts them into a folder's weights, `effect` and `sweep` measure them.
"""
