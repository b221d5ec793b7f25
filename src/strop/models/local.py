"""Whether a directory holds a model, told by its files. No torch: what submits jobs asks this too."""

from __future__ import annotations

from pathlib import Path

from strop.errors import UserError

WEIGHT_FILES = ("*.safetensors", "*.bin")


def check_model(path: str, key: str = "model.path") -> None:
    """Raise UserError if `path`, given by `key`, looks local and is no model directory; a hub name passes."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "assets/")) or path.count("/") > 1:
            hint = "; the demo's models are made by: python -m tools.demo_assets" if "assets" in path else ""
            raise UserError(f"{key}: {path} does not exist{hint}")
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{key}: {path} holds an adapter and no model: merge it with its base (of a run of strop: "
            "tools.convert_dcp_to_hf without --adapter; else PEFT's merge_and_unload) and give that directory"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json: not a model directory")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(f"{key}: {path} has a config.json but no weights ({' or '.join(WEIGHT_FILES)})")
