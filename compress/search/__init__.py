"""From "twice as fast, at most one point lost" to a run: candidates that are measured without training, then trained.

candidate.py      one point of a search: what it asks for beyond the base request
oneshot.py        makes a candidate without training and measures it; cutting.py: the file that is timed
sensitivity.py    what each group of layers bears
space.py          what may be chosen; target.py: what has to be reached
strategies.py     how the next candidate is chosen, by name: tpe.py, annealing.py (AutoCompress too), amc.py (requirements-search.txt)
forecast.py       how far from the limits a candidate will be, by what was measured
trials.py         the record of a search
target_search.py  the search itself, and the runs of its best candidates
pages.py          its HTML pages
"""
