"""The runs that are done, in a CSV file that grows by a line with each, so that an interrupted study can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from protocol import METRICS

KEY = ["data", "setting", "head", "seed"]
COLUMNS = [*KEY, "samples", *METRICS, "val_mae", "lr", "step", "seconds"]


class Records:
    """runs.csv in a folder, and options.json with what it was made with.

    Raises:
        ValueError: the folder holds runs that were made with other options.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.path = folder / "runs.csv"
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "options.json"
        options = json.loads(json.dumps(options))  # as they will be read back: lists in the place of tuples
        if self.path.is_file() and stored.is_file() and (before := json.loads(stored.read_text())) != options:
            changed = [name for name in {**before, **options} if options.get(name) != before.get(name)]
            raise ValueError(
                f"{folder} holds runs with other options ({', '.join(changed)}); give another --output, or delete the "
                "folder."
            )
        stored.write_text(json.dumps(options, indent=2) + "\n")
        text = self.path.read_text() if self.path.is_file() else ""
        # What follows the last newline is a line of an interrupted run.
        self.path.write_text(text[: text.rfind("\n") + 1] or ",".join(COLUMNS) + "\n")
        self._done = {tuple(key) for key in self.frame()[KEY].astype(str).to_numpy()}

    def __contains__(self, key: tuple[object, ...]) -> bool:
        """Whether there is a run with these values of `KEY`."""
        return tuple(map(str, key)) in self._done

    def add(self, row: dict[str, Any]) -> None:
        """Appends a run."""
        line = pd.DataFrame([row], columns=COLUMNS)
        line.to_csv(self.path, mode="a", header=False, index=False, float_format="%.6g")
        self._done.add(tuple(str(row[name]) for name in KEY))

    def frame(self) -> pd.DataFrame:
        """One row a run."""
        return pd.read_csv(self.path, dtype={"setting": str, "head": str, "data": str})
