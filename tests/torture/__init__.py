"""Attacks and faults by the hundred, against the real code: `make torture` runs all of it and prints a table.

A row is a `rows.Row` in a module of its own, listed in `table.ROWS`. Everything touches a temporary folder and this
machine's loopback only, and ends by itself.
"""
