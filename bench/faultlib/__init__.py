"""Runs under injected faults, and their judgement: for bench/faults.py and tests/slurm/test_faults.py."""
