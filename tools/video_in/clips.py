"""Find videos or pictures of a folder and their captions: in .txt files beside them, or in a table (JSONL or CSV)."""

import csv
import json
from typing import NamedTuple

from training.files import UserError

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}  # in any case


class Clip(NamedTuple):
    name: str  # its path below the folder, or as the table has it
    caption: str


def find_clips(folder, metadata=None, suffixes=SUFFIXES):
    """(clips, skipped): a list of Clip, each once, and a list of (name, reason). metadata: a table of the videos below
    the folder, see read_table, or None where each file of these suffixes has its caption in a .txt file beside it.
    """
    rows = read_table(metadata) if metadata else beside(folder, suffixes)
    clips, skipped = {}, []
    for name, caption in rows:
        caption = " ".join((caption or "").split())
        if not caption:
            skipped.append((name, "it has no caption in UTF-8"))
        elif not (folder / name).is_file():
            skipped.append((name, "there is no such file"))
        else:
            clips[Clip(name, caption)] = None
    return list(clips), skipped


def beside(folder, suffixes):
    """[(video's path below the folder, caption or None)] of all videos in a folder and its subfolders, sorted."""
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return [(str(path.relative_to(folder)), read_caption(path.with_suffix(".txt"))) for path in videos]


def read_caption(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def read_table(path):
    """[(file_name, caption)] of a UTF-8 table with these columns: CSV with a header, or JSON objects, one a line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            rows = [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))
            if any(None in row for row in rows):  # a caption with commas and without quotes would be cut
                raise ValueError("a row has more fields than the header: put captions that hold commas into quotes")
            return [(row["file_name"], row["caption"]) for row in rows]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(f"cannot read {path} as a table of file_name and caption: {error!r}") from None
