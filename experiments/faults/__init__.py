"""Faults that are done to semid on purpose: damaged files, kills, full disks, bad input. `experiments.reliability`."""
