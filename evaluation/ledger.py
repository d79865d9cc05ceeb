"""Files that survive kill -9: rows that are there or not, and whole files that are the old one or the new one."""

import json
import os

import torch.distributed as dist

from training.files import UserError, written_aside


def write_text(path, text):
    """Write a file aside, onto the disk, and rename it."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Ledger:
    """Rows of JSON with a key, kept through kill -9: one line per row, on the disk before the next row begins.

    Every rank appends to a part of its own; `merge` makes one sorted file of them. A line without its end is no row.
    """

    def __init__(self, folder, name, key, order):
        self.path, self.key, self.order = folder / f"{name}.jsonl", key, order
        self.part = folder / f"{name}.rank{dist.get_rank() if dist.is_initialized() else 0}.jsonl"

    def rows(self):
        """{key: row}, the newest of each."""
        rows = {}
        for path in [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"))]:
            # not splitlines: a prompt may hold what that takes for the end of a line
            lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    rows[row[self.key]] = row
                except (ValueError, KeyError, TypeError):
                    if number < len(lines):
                        raise UserError(f"{path}: line {number} is no row of it") from None
        return rows

    def append(self, row):
        with open(self.part, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def merge(self):
        """On rank 0, with no rank appending: all parts into one file. Returns the rows."""
        rows = self.rows()
        write_text(
            self.path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in sorted(rows.values(), key=self.order))
        )
        for part in self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"):
            part.unlink()
        return rows
