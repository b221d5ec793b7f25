"""What bench/faults.py and tests/slurm/test_faults.py share: runs under injected faults, and their judgement."""
