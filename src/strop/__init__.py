"""strop: post-training of language models as ordinary Slurm jobs.

Nothing is imported here: the batch shell's decision code runs from this package on the host's
bare python3, without torch or any third-party module.
"""
