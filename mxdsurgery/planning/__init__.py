"""What a conversion would take: memory, time, disk, and whether that fits.

Begin with `plan`; `calibrate` measures the machine, `budget` says what would fit.
"""
