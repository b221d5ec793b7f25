"""Make the token stores of a run beforehand, so that its job only maps files.

    python -m tools.prepare [--algo cpt] [--config FILE] [--workers N] [key=value ...]
    python -m tools.prepare model.path=assets/tiny data.train=my/texts data.cache_dir=stores
    python -m tools.prepare --algo sft --config configs/sft.yaml

Reads what the trainer would read (configuration, tokenizer, data.train, data.validation, validation.watch)
and leaves its stores in data.cache_dir (default: runs/.cache). They are named by their content: the job finds
them there, and a second call has nothing to do. An interrupted call goes on with the parts it has finished.
A store of text can also be named as data.train of a cpt run, which then does not look at the sources again.

cpt: text files, directories of them, JSONL, JSON and Parquet with the field prepare.text_key, hub sets.
Documents are filtered, equal and nearly equal ones left out (the keys under `prepare`: see
python -m strop.train cpt --help), data.split="98,1,1" takes a validation set out by a hash of the text.
What became of every document is printed, and kept as ledger-*.json beside the tokens.
sft, dpo, kto, rm: exactly the stores that the trainer makes; always in one process.

--workers defaults to the CPUs of the job or of this machine. Exit code 78: your error; 74: storage; after
TERM 75 if something was finished that the next call need not do again, else 143.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from strop import config as config_module
from strop import files
from strop.errors import EXIT_TERM, EXIT_YIELD, UserError
from strop.slurm import env, naming
from tools.command_line import Progress, command_parser, end_on_term, run


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--algo", choices=config_module.ALGOS, default="cpt")
    parser.add_argument("--config", type=Path, help="default: configs/<algo>.yaml")
    parser.add_argument("--workers", type=int, help="processes; default: the CPUs there are")
    parser.add_argument("--record", type=Path, help="JSON file to write when all is done: the stores")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


class Finished:
    """Whether this call has finished a part or a set that was not there before."""

    def __init__(self) -> None:
        self.any = False
        self._first: Optional[int] = None
        """Parts of the set that were there already; None until the set is being made."""

    def __call__(self, done: int, total: int) -> None:
        self._first = done if self._first is None else self._first
        self.any = self.any or (total > 0 and done > self._first)

    def set_is_there(self) -> None:
        self.any = self.any or self._first is not None
        self._first = None


def main() -> None:
    options = parse()
    notes: list[str] = []
    config = config_module.load(options.algo, options.config, options.overrides, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least one is needed")
    workers = options.workers or env.num_cpus()
    finished = Finished()
    end_on_term(lambda: EXIT_YIELD if finished.any else EXIT_TERM)
    # Workers are processes: threads of the tokenizer beside them would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers > 1 else "true"
    from strop.data import repeats, sets
    from strop.data.lengths import describe
    from strop.data.tokenise import load_tokenizer, tokenizer_digest

    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(config.model)
    progress = Progress()

    def count(done: int, total: int) -> None:
        finished(done, total)
        progress("parts" if total else "rows", done, total)

    maker = sets.Maker(
        config,
        config_module.KINDS[options.algo],
        tokenizer,
        tokenizer_digest(tokenizer),
        config_module.cache_dir(config, naming.parent_directory(config.run.dir)),
        workers,
        count,
    )
    train = None
    made: list[str] = []
    for name in maker.names():
        begin = time.monotonic()
        place, ledger = maker.prepare(name)
        finished.set_is_there()
        if train is None:
            train = place
        else:
            repeats.find_overlap(ledger, place, train)
        print(ledger.table())
        print(describe(sets.open_set(place, config, name), config.data.max_length))
        paths = sets.directories(place)
        made += paths
        print(f"store: {', '.join(paths)} ({time.monotonic() - begin:.1f} s)\n", flush=True)
    if options.record is not None:
        source = options.config or config_module.default_path(options.algo)
        told = {"config": str(source.resolve()), "config_sha256": files.sha256(source)}
        files.write_json(options.record, {**told, "stores": [str(Path(path).resolve()) for path in made]})


if __name__ == "__main__":
    run(main)
