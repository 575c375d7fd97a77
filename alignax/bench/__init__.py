"""Speed and memory of runs: the run's own programs, timed. `alignax bench` is the command."""
