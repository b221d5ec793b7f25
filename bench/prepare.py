"""Text to tokens: `tools.prepare` beside `datasets.map`, its memory on a large file, and opening a store.

    python -m bench.prepare [--data FILE.jsonl] [--mb 60] [--repeats 3] [--tokenizer DIR] [--json FILE]
    python -m bench.prepare --big [--big-gb 2]

The first: tokens a second from a JSONL file ({"text"}, made here unless given) to a store with its ledger,
against `datasets.map(batched=True, num_proc=2)` of the same tokenizer over the same rows, which have been
read into Arrow before its clock starts. Two processes each, in turns; medians. The ids must be the same.
Target: speedup_over_datasets_map >= 1.15. Then the time to open a store of 10^8 tokens: target under 0.1 s.

--big: `python -m tools.prepare` on a file of 2 GB, near-duplicates looked for, and the most memory that it
and its workers had together, as resident sets added up (shared pages count for each). Target: under 1.5 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "src")]  # run uninstalled
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # two processes, for both

import numpy as np  # noqa: E402

from bench import processes  # noqa: E402
from bench.results import write  # noqa: E402
from strop.config import Config, DataConfig, PrepareConfig  # noqa: E402
from strop.data import corpus, documents, prepare_text  # noqa: E402
from strop.data.corpus import Corpus, Range  # noqa: E402
from strop.data.tokenise import tokenizer_digest  # noqa: E402

WORKERS = 2
SYLLABLES = re.findall("..", "bacodienfugrahelinjokalomurniorpraquirestationunverwixayozether")


def texts(seed: int) -> Iterator[str]:
    """Documents of 20 to 600 words without end; words by Zipf's law out of 200,000, numbers, punctuation."""
    draw = np.random.default_rng(seed)
    pieces = draw.choice(SYLLABLES, (200_000, 4))
    counts = draw.integers(1, 5, len(pieces))
    vocabulary = np.array(["".join(p[:n]) for p, n in zip(pieces, counts)], dtype=object)
    vocabulary[draw.integers(0, len(vocabulary), 4000)] = [str(n) for n in draw.integers(0, 10**5, 4000)]
    shares = np.cumsum(1 / np.arange(1, len(vocabulary) + 1))
    while True:
        lengths = draw.integers(20, 600, 200)
        words = vocabulary[np.searchsorted(shares, draw.random(lengths.sum()) * shares[-1])]
        ends = np.flatnonzero(draw.random(len(words)) < 0.08)
        words[ends] += draw.choice([".", ",", ".\n", "?", ";", " -", ".\n\n"], len(ends))
        for begin, length in zip(np.cumsum(lengths) - lengths, lengths):
            yield " ".join(words[begin : begin + length])


def write_texts(path: Path, num_bytes: int) -> None:
    with open(path, "w") as file:
        for text in texts(0):
            file.write(json.dumps({"text": text}) + "\n")
            if file.tell() >= num_bytes:
                return


def ours(path: Path, tokenizer: Any, cache: Path) -> tuple[float, Corpus]:
    config = Config(data=DataConfig(train=str(path)), prepare=PrepareConfig(exact_duplicates=False))
    digest = tokenizer_digest(tokenizer)
    begin = time.perf_counter()
    found = {str(path): documents.find(str(path), "data.train", "train", config.data)}
    made = prepare_text.prepare(config, found, tokenizer, digest, cache, None, WORKERS)
    return time.perf_counter() - begin, made


def theirs(rows: Any, tokenizer: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    mapped = rows.map(
        lambda batch: tokenizer(batch["text"], add_special_tokens=False),
        batched=True,
        num_proc=WORKERS,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )
    return time.perf_counter() - begin, mapped


def speed(path: Path, tokenizer_path: str, repeats: int, work: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(work / "hf"))
    rows = rows.select_columns(["text"])
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(repeats):
        took, made = ours(path, tokenizer, work / f"cache-{i}")
        seconds["ours"].append(took)
        took, mapped = theirs(rows, tokenizer)
        seconds["theirs"].append(took)
    num_docs, num_tokens = len(made.offsets) - 1, int(made.offsets[-1])
    for index in range(0, num_docs, max(1, num_docs // 500)):
        assert made.document(index).tolist() == [*mapped[index]["input_ids"], tokenizer.eos_token_id], index
    mean = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "file_mb": path.stat().st_size / 1e6,
        "documents": num_docs,
        "tokens": num_tokens,
        "prepare_s": mean["ours"],
        "datasets_map_s": mean["theirs"],
        "prepare_tokens_per_s": num_tokens / mean["ours"],
        "datasets_map_tokens_per_s": num_tokens / mean["theirs"],
        "speedup_over_datasets_map": mean["theirs"] / mean["ours"],
    }


def opening(work: Path, num_tokens: int = 10**8, document: int = 500) -> dict[str, Any]:
    """Seconds to open a store of so many tokens (files with holes), in a fresh interpreter's second try."""
    work.mkdir()
    lengths = np.full(num_tokens // document, document)
    corpus.write_index(
        work,
        lengths=lengths,
        rows=np.zeros((len(lengths), 2)),
        sources=["a"],
        ranges=[Range("train", "a", 0, len(lengths))],
        digest="",
        tokenizer="",
    )
    for i, begin in enumerate(range(0, num_tokens, corpus.SHARD_TOKENS)):
        with open(work / corpus.shard_name(i), "wb") as file:
            file.truncate(4 * min(corpus.SHARD_TOKENS, num_tokens - begin))
    seconds = []
    for _ in range(5):
        begin_s = time.perf_counter()
        Corpus.open(work)
        seconds.append(time.perf_counter() - begin_s)
    return {"open_s": max(seconds)}


def memory(path: Path, tokenizer_path: str, work: Path) -> dict[str, Any]:
    """Peak of the resident sets of tools.prepare and its workers, added up."""
    words = [f"model.path={tokenizer_path}", f"data.train={path}", f"data.cache_dir={work / 'cache'}"]
    words += ["prepare.near_duplicates=0.8", f"--workers={WORKERS}"]
    command = [sys.executable, "-m", "tools.prepare", "--config", str(REPO / "configs/cpt.yaml"), *words]
    begin = time.monotonic()
    process = subprocess.Popen(command, cwd=REPO)
    peak = peak_pss = 0
    for turn in itertools.count():
        if process.poll() is not None:
            break
        tree = processes.tree(process.pid)
        peak = max(peak, sum(processes.kib(pid, "VmRSS") for pid in tree))
        if turn % 10 == 0:
            peak_pss = max(peak_pss, sum(processes.kib(pid, "Pss", "smaps_rollup") for pid in tree))
        time.sleep(0.1)
    assert process.returncode == 0, process.returncode
    return {
        "big_file_gb": path.stat().st_size / 1e9,
        "big_peak_rss_gb": peak * 1024 / 1e9,
        "big_peak_pss_gb": peak_pss * 1024 / 1e9,
        "big_s": time.monotonic() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a JSONL file with the field text")
    parser.add_argument("--mb", type=float, default=60, help="size of the file that is made")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", default="assets/smollm2-135m-instruct", help="directory or hub name")
    parser.add_argument("--big", action="store_true", help="memory on a large file, in place of speed")
    parser.add_argument("--big-gb", type=float, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        work = Path(name)
        path = args.data or work / "texts.jsonl"
        if args.data is None:
            write_texts(path, int(args.big_gb * 1e9 if args.big else args.mb * 1e6))
        if args.big:
            figures = memory(path, args.tokenizer, work)
        else:
            figures = speed(path, args.tokenizer, args.repeats, work) | opening(work / "store")
    for key, value in figures.items():
        print(f"{key:28} {value:,.3f}" if isinstance(value, float) else f"{key:28} {value:,}")
    if args.json:
        write(args.json, figures)


if __name__ == "__main__":
    main()
