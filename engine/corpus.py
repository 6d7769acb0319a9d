"""The files of a corpus: reading, checking and writing datasets, and what a run takes from them.

The format stands at the top of engine/schema.py. Errors name file, line and field: DataError.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.files import file_hash, parse_json, regular, write_whole
from engine.schema import (SPLITS, UNITS, DataError, Dataset, Problems, Record, dataset_rule,
                           nearest, show)
from engine.settings import Config

Rows = list[tuple[str, dict]]                        # (where it comes from, record as JSON)


def read_bytes(path: Path) -> bytes:
    """The content of a file; DataError where it cannot be read."""
    try:
        return regular(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: cannot be read ({reason}): check the path") from None


def read_filled(path: Path) -> bytes:
    """The bytes of a file of text; DataError where it is empty or begins with a BOM."""
    content = read_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: expected text, got an empty file: fill it or move it away")
    if content.startswith("\ufeff".encode()):
        raise DataError(f"{path}:1: expected UTF-8 without BOM, got one: save it without BOM")
    return content


def read_dataset(folder: Path) -> Dataset:
    """The descriptor in folder/dataset.json."""
    path, problems = folder / "dataset.json", Problems()
    content = read_filled(path)
    try:
        raw = parse_json(content)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}): repair the file") from None
    problems.check(raw, dataset_rule(raw, folder.name), str(path), "dataset")
    problems.raise_if_any()
    return Dataset(raw["name"], raw["units"], raw["labels"], raw.get("note", ""))


def read_split(folder: Path, split: str, dataset: Dataset, problems: Problems) -> list[Record]:
    """The records of folder/split.jsonl that are right; anything wrong is added to `problems`."""
    path, records, seen = folder / f"{split}.jsonl", [], {}
    lines = read_filled(path).removesuffix(b"\n").split(b"\n")  # U+2028 ends no line
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            raw = parse_json(line)
            if not isinstance(raw, dict):
                raise ValueError(f"a {type(raw).__name__}")
        except ValueError as error:
            reason = re.sub(r": line 1 (column \d+) .*", r", \1", str(error))
            text = show(line.decode("utf-8", "replace"))
            problems.add(where, "line", f"{text} is no JSON object ({reason}): write each record "
                         "as one object on one line, in UTF-8")
            continue
        if problems.check_record(raw, dataset, where, seen):
            records.append(Record(**{k: frozen(v) for k, v in raw.items()}, source=where))
    return records


def frozen(value: object) -> object:
    """The value with tuples for lists: a record remains as it was checked, boxes can be hashed."""
    if isinstance(value, dict):
        return {key: frozen(element) for key, element in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def load_datasets(corpus: str | os.PathLike) -> dict[str, Dataset]:
    """{name: descriptor} of every dataset below `corpus`, sorted by name.  A file that would be
    passed over in silence, dev.json or a *.jsonl of no split or no dataset, is an error."""
    corpus, files = Path(corpus), sorted(Path(corpus).glob("*/*.jsonl"))
    folders = sorted({path.parent for path in [*files, *corpus.glob("*/dataset.json")]})
    if not folders:
        got = "none" if corpus.is_dir() else "no folder"
        if (corpus / "dataset.json").exists():
            got = "a single dataset: give the folder above it"
        raise DataError(f"{corpus}: expected folders with a dataset.json, found {got}; "
                        "`python -m tools.convert` and `python demo.py` make a corpus")
    for path in sorted(path for folder in folders for path in folder.glob("*.*")):
        split = path.name.split(".")[0].lower()  # beside its .jsonl a file may be the source of it
        lost = split in SPLITS and path.is_file() and not (path.parent / f"{split}.jsonl").exists()
        if lost or path.suffix == ".jsonl" and path.stem not in SPLITS:
            raise DataError(f'{path}: "{path.name}" is no split: expected train, dev or test.jsonl '
                            "with a record on each line: rename or rewrite it, or move it away")
    return {folder.name: read_dataset(folder) for folder in folders}


def load_corpus(corpus: str | os.PathLike, split: str, units: Iterable[str] | None = None,
                needed: bool = True) -> list[Record]:
    """Every record of one split and these units (default all), datasets in the order of their
    names, lines in file order. A dataset may lack a split; a split that no dataset has, where it is
    `needed`, an unknown name and any faulty line raise DataError."""
    wanted = set(units or UNITS)
    if names := sorted({split} - set(SPLITS) | wanted - set(UNITS)):
        raise DataError(f'"{names[0]}" is no split or unit: {nearest(names[0], SPLITS + UNITS)}')
    problems, records, corpus = Problems(), None, Path(corpus)
    for name, dataset in load_datasets(corpus).items():
        if wanted & set(dataset.units.values()) and (corpus / name / f"{split}.jsonl").exists():
            read = read_split(corpus / name, split, dataset, problems)
            records = (records or []) + [r for r in read if dataset.units[r.task] in wanted]
    if records is None and needed:
        raise DataError(f"{corpus}: no {split}.jsonl for the units {', '.join(sorted(wanted))}: "
                        "convert that split or choose other units")
    problems.raise_if_any()
    return records or []


def read_splits(corpus: Path, units: Sequence[str] | None) -> dict[str, list[Record]]:
    """{split: its records of these units (None: all)}; empty lists for splits of no dataset."""
    return {split: load_corpus(corpus, split, units, needed=False) for split in SPLITS}


def write_dataset(folder: Path, descriptor: dict, splits: dict[str, Rows]) -> None:
    """Check everything, then write folder/{dataset.json, <split>.jsonl, images/}."""
    dataset, problems = Dataset(folder.name, descriptor["units"], descriptor["labels"]), Problems()
    problems.check(descriptor, dataset_rule(descriptor, folder.name), str(folder), "dataset")
    for split, rows in splits.items():
        seen = {}
        if not rows:
            problems.add(str(folder), split, "has no record: leave its file out")
        for where, record in rows:
            problems.check_record(record, dataset, where, seen)
    problems.raise_if_any()
    texts = {f"{split}.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n"
                                       for _, record in rows) for split, rows in splits.items()}
    texts["dataset.json"] = json.dumps(descriptor, ensure_ascii=False, indent=1) + "\n"
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(folder / name, text.encode())
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}): make room, or give "
                        "another folder") from None


def corpus_of(config: Config) -> Path:
    """The corpus that settings name, else the demo world."""
    return Path(config.data or "data/demo")


def corpus_hash(corpus: Path) -> str:
    """sha256 over the rows and label sets of a corpus, in hex; images count by their names."""
    files = sorted(file for file in corpus.glob("*/*") if file.suffix in (".json", ".jsonl"))
    named = (f"{file.parent.name}/{file.name} {file_hash(file)}\n" for file in files)
    return hashlib.sha256("".join(named).encode()).hexdigest()


def split_digest(corpus: Path, split: str) -> str:
    """sha256 over the files of a split and the names of all images below the corpus, in hex."""
    files = sorted([*corpus.glob("*/dataset.json"), *corpus.glob(f"*/{split}.jsonl")])
    paths = {*corpus.glob("*/images/**/*"), *corpus.glob("*/images/*/**/*")}  # ** enters no link
    images = sorted(str(path.relative_to(corpus)) for path in paths)
    names = "\n".join(images).encode(errors="surrogateescape")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + names).hexdigest()


def unit_rows(records: Sequence[Record], datasets: dict[str, Dataset]) -> dict[str, int]:
    """{unit: number of its records}, in the order of the result table; no unit has 0."""
    names = [datasets[record.dataset].units[record.task] for record in records]
    return {unit: names.count(unit) for unit in UNITS if unit in names}


def normalised(record: Record) -> str:
    """A text as duplicates are compared: no URLs, lower case, letters and digits only."""
    text = " ".join(token for token in record.tokens if not token.lower().startswith("http"))
    return "".join(filter(str.isalnum, text.lower()))


def texts_of(records: Iterable[Record]) -> set[str]:
    """The different normalised texts of records; pictures without text have none."""
    return set(map(normalised, records)) - {""}


def hold_out(records: dict[str, list[Record]], datasets: dict[str, Dataset],
             how: str) -> str | None:
    """Take Table 4's units out of the train and dev records, in place; return a line that says so.
    how: "none", then the result is None; "paper": T17 and V2; "clean": also SNAP, drawn from the
    same pool of tweets as T17, and every text of another dataset that stands in the test split of
    T17 or V2 (V1 holds 183 of T17's)."""
    if how == "none":
        return None
    away = {"T17", "V2"} | ({"SNAP"} if how == "clean" else set())

    def unit(record: Record) -> str:
        return datasets[record.dataset].units[record.task]

    tested = texts_of(r for r in records["test"] if unit(r) in ("T17", "V2") and how == "clean")
    dropped = 0
    for split in ("train", "dev"):
        kept = [record for record in records[split] if unit(record) not in away]
        records[split] = [record for record in kept if normalised(record) not in tested]
        dropped += len(kept) - len(records[split])
    return (f"hold-out ({how}): {', '.join(u for u in UNITS if u in away)} neither in train nor in "
            f"dev; {dropped} more records left out, whose text is in the test split of T17 or V2")
