"""The folder of an evaluation: its record, manifest and videos, and one line for what does not belong in it.

config.json     the record: configuration and its hash, prompts with the names of their files, revision, versions
manifest.jsonl  a row per video
videos/         the videos, nothing else
scores/, results.json, results.md, sheets/   what is made of them
"""

from dataclasses import dataclass

from evaluation.ledger import Ledger, write_json
from training import media
from training.files import UserError, make_folder, read_json


@dataclass
class Videos:
    """The videos that --dims and --limit ask for."""

    items: list
    """Prompts, see vbench.distinct."""
    files: dict
    """{file: bytes} of their videos that are there."""
    expected: int
    """Videos that --dims needs in all."""
    prompts: int
    """Prompts that --dims needs in all."""
    partial: bool
    """Whether some of those videos are missing."""


def read_record(folder):
    """config.json of an evaluation's folder."""
    record = read_json(folder / "config.json")
    if not {"hash", "config", "items", "vbench_list"} <= record.keys() or "prompts" not in record["config"]:
        raise UserError(f"{folder} is no evaluation: its config.json is of something else")
    return record


def read_video(path):
    """The frames of an evaluation's video or image, [3, f, h, w] in [0, 1]."""
    try:
        return media.read_video(path)
    except ValueError as error:
        raise UserError(f"{error}: delete it and generate it again", code=1, alone=True) from None


def manifest(out):
    return Ledger(out, "manifest", "file", lambda row: (row["entry"], row["sample"]))


def is_done(out, row, config_hash):
    """Whether the video of a manifest row (or None) is there, whole, and of this configuration."""
    path = out / "videos" / row["file"] if row and row["config"] == config_hash else None
    return path is not None and path.is_file() and path.stat().st_size == row["bytes"]


def select(items, dims, limit):
    """The items that --dims and --limit ask for."""
    wanted = [item for item in items if not dims or set(dims) & set(item["dimensions"])]
    return wanted[: limit or None]


def files_of(dimension, items, found):
    """{file: bytes} of a dimension's videos that are there, at most 5 per prompt. found None: of all, {file: None}."""
    names = [name for item in items if dimension in item["dimensions"] for name in item["files"][:5]]
    return {name: found[name] for name in names if name in found} if found is not None else dict.fromkeys(names)


def refuse_mixed(out, record, rows):
    """One line for a file that is no video of the list, or a manifest row of another configuration."""
    known = {file for item in record["items"] for file in item["files"]}
    if strays := sorted({path.name for path in (out / "videos").glob("*")} - known):
        raise UserError(f"{out / 'videos'} holds {strays[0]!r}, no video of this list ({len(strays)} such): move it")
    if mixed := [row["file"] for row in rows.values() if row["config"] != record["hash"]]:
        raise UserError(f"the manifest in {out} mixes configurations ({mixed[0]!r}): generate into another --out")


def open_folder(out, record):
    """On rank 0: make the folder, or check that what is in it belongs to this configuration. Returns the rows."""
    before, videos = out / "config.json", out / "videos"
    if before.is_file():
        known = read_record(out)["config"]
        differ = [k for k in sorted({*known, *record["config"]}) if known.get(k) != record["config"].get(k)]
        if differ:
            raise UserError(f"{out} holds videos of another configuration ({', '.join(differ)}): use another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and no evaluation (no config.json): use another --out")
    make_folder(videos, hint="; see --out")
    for leftover in videos.glob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    rows = manifest(out).merge()
    refuse_mixed(out, record, rows)
    if not before.is_file():
        write_json(before, record)
    return rows


def find_videos(out, record, dims, limit, allow_partial):
    """The Videos that are there. One line for files that do not belong, for rows of another configuration and, unless
    allow_partial, for missing videos: VBench would take all of these without a word.
    """
    rows = manifest(out).rows()
    refuse_mixed(out, record, rows)
    items, needed = select(record["items"], dims, limit), select(record["items"], dims, 0)
    found = [file for item in items for file in item["files"] if is_done(out, rows.get(file), record["hash"])]
    gone = [file for item in needed for file in item["files"] if file not in set(found)]
    expected = len(found) + len(gone)
    if gone and not allow_partial:
        missing = f"{len(gone)} of {expected} videos are missing, the first is {gone[0]!r}"
        raise UserError(f"{missing}: run generate again, or --allow-partial")
    if not found:
        raise UserError(f"{out} holds none of the {expected} videos: run generate first")
    return Videos(items, {file: rows[file]["bytes"] for file in found}, expected, len(needed), bool(gone))
