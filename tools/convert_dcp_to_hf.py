"""A run's checkpoint as a Hugging Face directory: safetensors, configuration, tokenizer, chat template.

    python -m tools.convert_dcp_to_hf --run runs/NAME [--step N|latest|best] [--out DIR] [--adapter]
                                      [--dtype bf16|fp16|fp32] [--max-shard-size 4GB] [--force]

or with the names that users of NeMo RL know:

    python -m tools.convert_dcp_to_hf --config FILE --dcp-ckpt-path STEP_DIR --hf-ckpt-path DIR

For a job behind the run's own: --finished refuses a run that has not come to its end, and --update leaves a
result alone that is of this very checkpoint, and replaces another one.

Without --out the result is runs/NAME/export/step-000100, without --dtype it has the base model's type. The
adapters of a LoRA run are added to the weights that they were trained beside (model.path, which must be the
same still); with --adapter they are written in PEFT's format instead, in fp32, to .../step-000100-adapter.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from strop import files
from strop.config import ALGOS, Config, cache_dir, load
from strop.errors import UserError
from strop.pipeline import exports
from strop.slurm import attempts
from tools.command_line import command_parser, end_on_term, run


def read_config(file: Path) -> Config:
    """A run's config.yaml, or any configuration file of strop's."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; --run wants a run's directory, --config a configuration")
    # A run's file names its algorithm; for the model and its adapters it does not matter.
    named = re.search(r"^algo: *(\w+)", file.read_text(), re.MULTILINE)
    config = load(named[1] if named else ALGOS[0], file, [])
    if config.model.path is None:
        raise UserError(f"{file}: model.path is not set")
    return config


def refuse_unfinished(run_dir: Path) -> None:
    """A job behind the run's may have been let go by a job that ended well, and was not the run's end."""
    newest = (attempts.read_all(run_dir) or [{"state": "X"}])[-1]
    if newest["state"] != "DONE":
        why = (newest.get("summary") or "it has no outcome").splitlines()[0]
        raise UserError(f"--finished: {run_dir} has not finished: {why}")


def parse_size(text: str) -> int:
    """ "4GB", "500MB", "0.5 GB" or plain bytes -> bytes (decimal units, as in transformers)."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None or match[1].count(".") > 1 or match[1] == ".":
        raise UserError(f"--max-shard-size {text}: expected a size such as 4GB or 500MB")
    size = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])
    if size <= 0:
        raise UserError(f"--max-shard-size {text}: must be positive")
    return size


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, help="run directory")
    parser.add_argument("--step", default="latest", help="step number, latest or best")
    parser.add_argument("--config", type=Path, help="configuration with the base model (instead of --run)")
    parser.add_argument("--dcp-ckpt-path", type=Path, help="checkpoint directory (with --config)")
    parser.add_argument("--out", "--hf-ckpt-path", dest="out", type=Path, help="directory to write")
    parser.add_argument("--adapter", action="store_true", help="PEFT's files instead of a whole model (LoRA)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--max-shard-size", default="4GB")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    parser.add_argument("--finished", action="store_true", help="only of a run that has finished")
    parser.add_argument("--update", action="store_true", help="replace an existing --out if it is outdated")
    args = parser.parse_args()
    by_path = args.config is not None and args.dcp_ckpt_path is not None and args.out is not None
    if (args.run is None) == (not by_path):
        parser.error("give --run, or --config with --dcp-ckpt-path and --hf-ckpt-path")
    if by_path and (args.finished or args.update):
        parser.error("--finished and --update need --run")
    if args.finished:
        refuse_unfinished(args.run)

    end_on_term()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: what is not cached is an error
    from transformers.utils.logging import disable_progress_bar

    from strop.models import export

    disable_progress_bar()

    if by_path:
        config, directory, out = read_config(args.config), args.dcp_ckpt_path, args.out
        if not (directory / ".metadata").is_file():
            raise UserError(f"--dcp-ckpt-path {directory}: not a DCP checkpoint (no .metadata in it)")
    else:
        config = read_config(args.run / "config.yaml")
        directory = export.find_checkpoint(args.run, args.step)
        out = args.out or args.run / "export" / (directory.name + ("-adapter" if args.adapter else ""))
        if args.update and exports.is_of(out, directory, args.dtype, args.adapter):
            print(f"{out} is of {directory} already", file=sys.stderr)
            return
    if args.update:  # a job that was killed before this one has left what it had written
        files.remove_left_over(out)
    export.export_checkpoint(
        directory,
        config.model,
        out,
        lora=config.lora,
        adapter=args.adapter,
        dtype=args.dtype,
        max_shard_bytes=parse_size(args.max_shard_size),
        replace=args.force or args.update,
        cache=None if by_path else cache_dir(config, args.run.parent),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if not by_path:
        exports.mark(out, directory, args.dtype, args.adapter)
    print(f"wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
