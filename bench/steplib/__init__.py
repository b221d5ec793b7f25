"""Parts of bench/step.py: what is trained (inputs), how each side is run (sides), TRL's own process
(trl_worker)."""
