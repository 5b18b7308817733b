"""Sets of ranks and calibration on real data: a head that is fitted to few labels, half of the validation part for
`op.calibrate`, the other half for `op.ConformalRanks`, judged on the test part.

    python benchmarks/heads/uncertainty.py --data words
    python benchmarks/heads/uncertainty.py --data sst5 --folder data/sst5 --shots 4
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
import torch
from compare import load_task, parser
from prompts import fitted
from protocol import Setting
from task import Task

import ordinal_prompt as op
from ordinal_prompt import metrics

COVERAGE = 0.9


def judge(task: Task, shots: str, seed: int) -> list[dict[str, Any]]:
    """A row for each kind of sets, and one for the calibration error before and after."""
    indices = Setting.parse(shots).indices(task.labels["train"], seed)
    predict = fitted(task).fit(task.features["train"][indices], task.labels["train"][indices])
    logits = {part: predict(task.features[part]).log() for part in ("val", "test")}
    order = torch.randperm(len(logits["val"]), generator=torch.Generator().manual_seed(seed))
    half, other = order.tensor_split(2)
    labels, true = task.labels["val"], task.labels["test"]
    calibration = op.calibrate(logits["val"][half], labels[half])
    held_out, test = calibration(logits["val"][other]), calibration(logits["test"])
    error = metrics.ordinal_calibration_error
    rows: list[dict[str, Any]] = [
        {"sets": "none: calibration error", "before": error(logits["test"], true), "after": error(test, true)}
    ]
    for score in ("cdf", "rps"):
        for by_rank in (False, True):
            sets = op.ConformalRanks(COVERAGE, score, by_rank).fit(held_out, labels[other]).predict(test)
            found = {"coverage": metrics.coverage(*sets, true), "width": metrics.mean_width(*sets)}
            of_ranks = metrics.coverage_by_rank(*sets, true, task.num_ranks)
            least = float(of_ranks[of_ranks.isfinite()].min())
            rows.append({"sets": f"{score}{', by rank' * by_rank}", **found, "coverage of the worst rank": least})
    return rows


def main() -> None:
    """Command line entry; prints means over the seeds."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--shots", default="16", help="training samples per rank (default: 16)")
    given, rest = own.parse_known_args()
    options = parser().parse_args(rest)
    task = load_task(options)
    runs = [{"seed": seed, **row} for seed in options.seeds for row in judge(task, given.shots, seed)]
    table = pd.DataFrame(runs).groupby("sets", sort=False).mean().drop(columns="seed")
    print(f"{task.name}: {task.num_ranks} ranks, {given.shots} labels per rank, sets for {COVERAGE:.0%}")
    print(table.round(3).to_string(na_rep=""))


if __name__ == "__main__":
    main()
