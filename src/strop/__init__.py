"""strop: post-training of language models as ordinary Slurm jobs.

Nothing is imported here: the batch shell's decision code runs from this package on the host's
bare python3, without torch or any third-party module. `strop.recipes` comes at its first use.
"""


def __getattr__(name):
    if name == "recipes":
        import importlib

        return importlib.import_module("strop.recipes")
    raise AttributeError(f"module 'strop' has no attribute {name!r}")
