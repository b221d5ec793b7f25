"""Everything that can be known about a job before it waits in a queue: on a login node, without a GPU.

Configuration -> model and tokenizer as they lie on disk -> the first rows through the trainer's own
renderer and tokeniser -> steps, memory and disk by arithmetic -> run directory, host and Slurm. Each
look gives `Check`s; nothing is written and nothing is downloaded.
"""
