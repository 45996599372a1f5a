"""What a run can be asked for, as plain data that imports neither torch nor a runtime.

The request, the command line, the web form and the packages that do the work read the same tables, so that a name is
spelled once.
"""
