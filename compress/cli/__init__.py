"""The command `espalier`, also `python -m compress`."""
