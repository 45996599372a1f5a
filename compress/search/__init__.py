"""From "twice as fast, at most one point lost" to a run: candidates that are measured without training, then trained.

candidate.py   one point of a search: what it asks for beyond the base request
oneshot.py     makes a candidate without training and measures it
space.py       what may be chosen; target.py: what has to be reached
strategies.py  how the next candidate is chosen, by name; annealing.py: simulated annealing and AutoCompress;
               amc.py: a reinforcement-learning agent (requirements-search.txt)
forecast.py    how far from the limits a candidate will be, by what was measured
"""
