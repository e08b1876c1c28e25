"""Fault injection for `experiments.reliability`: damaged files, kills, full disks, bad input."""
