"""Find the videos of a folder and their captions: in .txt files beside them, or in a table (JSONL or CSV)."""

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from training.files import UserError

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}  # in any case
PATH_COLUMNS = ("file_name", "path", "video", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")


class Clip(NamedTuple):
    name: str  # its path below the folder, or as the table has it
    path: Path
    caption: str


def find_clips(folder, metadata, out):
    """(clips, skipped, aside): a list of Clip, a list of (name, reason), a Counter of what else is in the folder.

    It is looked through with its subfolders and links to folders, but without `out`. metadata: a table (see read_table)
    that names the videos, or None where each has its caption in a .txt file beside it.
    """
    videos, skipped, aside = find_videos(folder, out)
    clips, seen = [], set()
    if metadata is None:
        rows = [(str(path.relative_to(folder)), *caption_beside(path)) for path in videos]
    else:
        rows = [(name, text, f"its caption in {metadata.name} is empty") for name, text in read_table(metadata)]
        named = {os.path.normpath(folder / name) for name, _, _ in rows}
        aside["videos that the table does not name"] = sum(os.path.normpath(path) not in named for path in videos)
    for name, text, problem in rows:
        clip = Clip(name, folder / name, " ".join((text or "").split()))
        if not clip.caption:
            skipped.append((name, problem))
        elif not clip.path.is_file():
            skipped.append((name, "there is no such file"))
        elif clip in seen:
            skipped.append((name, "it is named twice with the same caption"))
        else:
            clips.append(clip)
            seen.add(clip)
    return clips, skipped, +aside


def find_videos(folder, out):
    """(videos, skipped, aside), see find_clips: a sorted list of paths. A folder that is met again is not entered."""
    videos, skipped, aside = [], [], Counter()
    seen = {os.path.realpath(out)} - {os.path.realpath(folder)}
    unreadable = lambda error: skipped.append((str(error.filename), f"the folder cannot be read: {error.strerror}"))
    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # do not go down
            continue
        seen.add(real)
        folders.sort()
        paths = [Path(place, file) for file in files]
        here = {path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith("._")}
        videos += here
        captions = {path.with_suffix(".txt") for path in here}
        for path in paths:
            if path.name.startswith("._"):
                aside["._ (macOS)"] += 1
            elif path not in here and path not in captions:
                aside[path.suffix.lower() or "without a suffix"] += 1
    return sorted(videos), skipped, aside


def caption_beside(path):
    """(caption or None, why there is none) of a video."""
    file = path.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig"), f"its caption {file.name} is empty"
    except UnicodeDecodeError:
        return None, f"its caption {file.name} is not UTF-8"
    except OSError as error:
        return None, f"it has no caption {file.name} beside it: {error.strerror}"


def read_table(path):
    """[(video's path, caption or None)] of a table, see read_rows."""
    pairs = []
    for number, row in read_rows(path):
        name = first_of(row, PATH_COLUMNS)
        if not name:
            raise UserError(
                f"{path}, line {number}: no path of a video; it is read from a column {', '.join(PATH_COLUMNS)}"
            )
        pairs.append((name, first_of(row, CAPTION_COLUMNS)))
    if not any(caption for _, caption in pairs):
        raise UserError(f"{path} has no captions; they are read from a column {', '.join(CAPTION_COLUMNS)}")
    return pairs


def read_rows(path):
    """[(line number, dict)] of a UTF-8 table: JSON objects, one a line, or CSV with a header (tabs or ; will do)."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        if lines == [""]:
            raise ValueError("it is empty")
        if lines[0].lstrip().startswith("["):
            raise ValueError("it is a JSON list; write one object per line")
        if lines[0].lstrip().startswith("{"):
            rows = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
        else:
            delimiter = max(",;\t", key=lines[0].count)
            reader = csv.DictReader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path} as JSONL or CSV: {getattr(error, 'strerror', None) or error}") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: no JSON object")
        if None in row:  # more fields than columns
            raise UserError(
                f"{path}, line {number}: more fields than columns; put a caption that holds commas into quotes"
            )
    return rows


def first_of(row, columns):
    """The text in the first of `columns` that a table's row has, stripped; None if there is none."""
    value = next((row[name] for name in columns if name in row), None)
    return value.strip() or None if isinstance(value, str) else None
