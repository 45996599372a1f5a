"""The same checkpoints compressed by others and by Espalier, deployed to the same runtimes: `python -m bench.peers`.

rows.py            what is compared: a script, its environment, its options
requirements/      what is installed for each peer, in an environment of its own
scripts/           what a user of each peer would write; handover.py is how they get the job
environments.py    makes the environments
driver.py          runs a script in its environment and keeps what came of it
measure.py         accuracy through the deployed files, latency in turns
front.py           which points are dominated
table.py           docs/benchmarks.md
"""
