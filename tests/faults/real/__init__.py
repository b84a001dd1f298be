"""Real faults on real processes: what is killed, paused, cut off and filled up, and what must hold all the same."""
