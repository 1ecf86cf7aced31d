"""``python -m mxdsurgery``."""

from mxdsurgery.cli import main

main(prog_name="mxdsurgery")
