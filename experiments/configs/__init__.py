"""Experiments, one file each: what is trained, why, by what command, and what should come out."""
