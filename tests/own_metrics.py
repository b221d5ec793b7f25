"""What a user might write for `validation.metrics`: every value that there is as a number, and mistakes."""

from __future__ import annotations

from zlib import crc32

from strop.user_metrics import ValidationRows


def everything(rows: ValidationRows) -> dict[str, float]:
    out: dict[str, float] = {"rows": len(rows.places)}
    for i, (_, line) in enumerate(rows.places):
        out[f"line/{i}"] = line
        for s, completion in enumerate(rows.completions[i]):
            out[f"text/{i}/{s}"] = crc32((rows.prompts[i] + completion).encode())
            out[f"prompt/{i}/{s}"] = len(rows.prompts[i])
            out[f"trained/{i}/{s}"] = rows.num_trained[i, s]
            if rows.logps is not None:
                out[f"logp/{i}/{s}"] = rows.logps[i, s]
            if rows.ref_logps is not None and rows.rewards is not None:
                out[f"ref/{i}/{s}"] = rows.ref_logps[i, s]
                out[f"reward/{i}/{s}"] = rows.rewards[i, s]
    return out


def steps(rows: ValidationRows) -> dict[str, float]:
    return {"steps": rows.step}


def broken(rows: ValidationRows) -> dict[str, float]:
    return {"third": float(rows.completions[0][2])}
