"""The simulator: api, lane and tail in one deterministic event loop, over a log, tables and blobs that fail on request.

Time is virtual, the seed decides whose turn it is and what breaks, and a run with the same seed is the same run, so a
failure replays. `loop` is the scheduler, `world` what processes share and where faults happen, `ports` the log, the
blobs and the worker as a process sees them, `generations` the tables and what rebuilds them, `processes` the services
on these, `clients` who asks them, `scenarios` the stories, `checks` what must be true afterwards, `run` one run from a
seed to its violations. `python -m tests.faults.simulation` runs many.
"""
