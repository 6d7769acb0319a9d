"""The commands behind data.py: convert published datasets to a corpus, and check a corpus.

    python data.py convert KIND SRC DST      KIND and the files that SRC holds:
        twitter2015, twitter2017, snap       {train,valid,test}.txt
        mnre_v1 | mnre_v2                    ours_{train,val,test}.txt | mnre_{train,val,test}.txt
        m2e2                                 crossmedia_coref.txt, {text,image}_multimedia_event.json
    python data.py check DST                 validate everything, print counts and duplicates

A converter writes DST/KIND in the format at the top of data.py; put (or link) the pictures into
DST/KIND/images. Sources: Twitter-15/17 github.com/jefferyYu/UMT; SNAP (Lu et al., ACL 2018); MNRE
github.com/thecharm/MNRE; M2E2 github.com/limanling/m2e2.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from data import (SPLITS, DataError, Dataset, Problems, Record, gold_items, load_datasets, nearest,
                  parse_json, prompt, read_bytes, read_split, show, target, write_dataset)

Rows = list[tuple[str, dict]]                        # (file:line of the source, record as JSON)

# The fourth type is OTHER in Twitter-15 and MISC in Twitter-17.
TAGS = {"PER": "person", "LOC": "location", "ORG": "organization", "OTHER": "miscellaneous",
        "MISC": "miscellaneous"}
# The annotation schemes, not the labels of a training split: two of V1's occur in test only.
RELATIONS = {
    "mnre_v1": """none /loc/loc/administration_divisions /loc/loc/capital /loc/loc/contain
        /misc/loc/held_on /misc/misc/held_on /misc/misc/part_of /org/loc/locate_at
        /org/org/alternate_names /org/org/subsidiary /per/loc/place_of_birth
        /per/loc/place_of_death /per/loc/place_of_residence /per/misc/awarded /per/misc/creat
        /per/misc/nationality /per/misc/present_in /per/misc/race /per/misc/religion
        /per/org/founder_of /per/org/leader /per/org/member_of /per/per/alternate_names
        /per/per/charges /per/per/classmate /per/per/colleague /per/per/couple /per/per/neighbor
        /per/per/parent /per/per/peer /per/per/relative /per/per/siblings""".split(),
    "mnre_v2": """None /loc/loc/contain /misc/loc/held_on /misc/misc/part_of /org/loc/locate_at
        /org/org/alternate_names /org/org/subsidiary /per/loc/place_of_birth
        /per/loc/place_of_residence /per/misc/awarded /per/misc/nationality /per/misc/present_in
        /per/misc/race /per/misc/religion /per/org/member_of /per/per/alternate_names
        /per/per/alumi /per/per/charges /per/per/couple /per/per/neighbor /per/per/parent
        /per/per/peer /per/per/siblings""".split()}
RENAMED = {"None": "none", "/per/per/alumi": "alumni", "/misc/misc/held_on": "held on (event)",
           "/per/per/alternate_names": "alternate names (person)",
           "/org/org/alternate_names": "alternate names (organization)"}
M2E2_ROLES = {
    "Conflict:Attack": ["attacker", "instrument", "place", "target"],
    "Conflict:Demonstrate": ["entity", "instrument", "place", "police"],
    "Contact:Meet": ["entity", "place"],
    "Contact:Phone-Write": ["entity", "instrument", "place"],
    "Justice:Arrest-Jail": ["agent", "instrument", "person", "place"],
    "Life:Die": ["agent", "instrument", "place", "victim"],
    "Movement:Transport": ["agent", "artifact", "destination", "origin", "vehicle"],
    "Transaction:Transfer-Money": ["giver", "money", "recipient"]}


def relation_word(path: str) -> str:
    """"/per/loc/place_of_birth" -> "place of birth"; injective within a dataset."""
    return RENAMED.get(path, path.split("/")[-1].replace("_", " "))


def event_word(name: str) -> str:
    """"Justice:Arrest-Jail" -> "arrest jail"."""
    return name.split(":")[1].replace("-", " ").lower()



def raw_record(kind: str, task: str, name: str, tokens: list[str], image: str, objects: list,
               **gold: object) -> dict:
    """A record as JSON; the size of the image is unknown until somebody has the image."""
    return {"id": name, "dataset": kind, "task": task, "tokens": tokens, "image": image,
            "size": None, "objects": objects, **gold}


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of a UTF-8 file; only LF and CRLF end a line."""
    for number, line in enumerate(read_bytes(path).removesuffix(b"\n").split(b"\n"), 1):
        try:
            yield f"{path}:{number}", line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error}): save it as UTF-8") from None


def read_conll(path: Path, kind: str) -> Rows:
    """`IMGID:name`, then token<TAB>tag lines, then a blank line.

    Chunks are read leniently: an I- tag that continues nothing starts an entity, as the scorers
    of the field have it (Twitter-15 has hundreds of them).
    """
    rows, inside = [], False
    for where, line in read_lines(path):
        token, tab, tag = line.rpartition("\t")
        mark, _, label = tag.partition("-")
        if line.startswith("IMGID:") and not tab:
            name, inside = line.removeprefix("IMGID:"), True
            rows.append((where, raw_record(kind, "mner", name, [], f"{name}.jpg", [], entities=[])))
        elif not line:
            inside = False
        elif not inside or not token or tag != "O" and not (mark in ("B", "I") and label in TAGS):
            raise DataError(f"{where}: expected token<TAB>tag below an IMGID line, tag O or B-/I- "
                            f"and one of {', '.join(TAGS)}, got {show(line)}: correct the file")
        else:
            tokens, entities = rows[-1][1]["tokens"], rows[-1][1]["entities"]
            tokens.append(token)
            here = {"type": TAGS.get(label), "start": len(tokens) - 1, "end": len(tokens)}
            last = entities[-1] if entities else {"type": None, "end": None}
            if mark == "I" and (last["type"], last["end"]) == (here["type"], here["start"]):
                last["end"] += 1
            elif mark != "O":
                entities.append(here)
    return rows


def read_mnre(path: Path, kind: str) -> Rows:
    """One Python literal per line. Names come from the offsets; V1's image ids may be numbers."""
    rows = []
    for number, (where, line) in enumerate(read_lines(path), 1):
        try:
            row = ast.literal_eval(line)
            tokens, image, relation = row["token"], row["img_id"], row["relation"]
            head, tail = row["h"]["pos"], row["t"]["pos"]
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
            raise DataError(f"{where}: expected a Python dict with token, h, t, img_id, relation, "
                            f"got {show(line)} ({error!r}): fetch the file again") from None
        if relation not in RELATIONS[kind]:
            raise DataError(f"{where}: relation {show(relation)} is not in the scheme of {kind}: "
                            + nearest(relation, RELATIONS[kind]))
        image = f"{image}.jpg" if type(image) is int else image
        rows.append((where, raw_record(kind, "mre", f"{number}", tokens, image, [], head=head,
                                       tail=tail, relation=relation_word(relation))))
    return rows


def read_m2e2(path: Path, kind: str) -> Rows:
    """A med and a meae record for each line of crossmedia_coref.txt, in gold-box mode.

    Gold-box mode: the objects are the image's gold boxes in file order, as UMIE has it. It leaks
    their number, so results must name it. Where line and image disagree about the event type, the
    arguments in the image are dropped and those in the text stay.
    """
    try:
        texts = parse_json(read_bytes(path.with_name("text_multimedia_event.json")))
        sentences = {sentence["sentence_id"]: sentence for sentence in texts}
        images = parse_json(read_bytes(path.with_name("image_multimedia_event.json")))
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path.parent}: expected M2E2's annotations, got {error!r}: fetch "
                        "text_ and image_multimedia_event.json again") from None
    rows = []
    for where, line in read_lines(path):
        try:
            name, image, coref = line.split("\t")
            sentence, picture = sentences[name], images[image.removesuffix(".jpg")]
            boxes = [(role, box[1:]) for role, some in picture["role"].items() for box in some]
            agree = coref == picture["event_type"]
            event = m2e2_event(sentence["golden-event-mentions"], boxes if agree else [])
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{where}: expected sentence<TAB>image.jpg<TAB>event type, all of them "
                            f"annotated, got {show(line)} ({error!r}): fetch it again") from None
        rows += [(where, raw_record(kind, task, f"{name}+{image}/{task}", sentence["words"], image,
                                    [box for _, box in boxes], events=[event]))
                 for task in ("med", "meae")]
    return rows


def m2e2_event(mentions: list[dict], boxes: list[tuple[str, list[int]]]) -> dict:
    """The one event of a sentence with its arguments in the text and in the image."""
    [event] = mentions
    arguments = [{"role": a["role"].lower(), "span": [a["start"], a["end"]]}
                 for a in event["arguments"]]
    arguments += [{"role": role.lower(), "box": box, "object": k}
                  for k, (role, box) in enumerate(boxes, 1)]
    trigger = [event["trigger"]["start"], event["trigger"]["end"]]
    return {"type": event_word(event["event_type"]), "trigger": trigger, "arguments": arguments}


TWITTER = {"mner": sorted(set(TAGS.values()))}
M2E2 = {event_word(name): roles for name, roles in M2E2_ROLES.items()}
LABELS = {"twitter2015": TWITTER, "twitter2017": TWITTER, "snap": TWITTER,
          "m2e2": {"med": sorted(M2E2), "meae": M2E2},
          **{kind: {"mre": sorted(map(relation_word, paths))} for kind, paths in RELATIONS.items()}}
# kind: (reader, {record task: unit}, {split: (published file, its number of records)})
KINDS = {
    "twitter2015": (read_conll, {"mner": "T15"}, {
        "train": ("train.txt", 4000), "dev": ("valid.txt", 1000), "test": ("test.txt", 3257)}),
    "twitter2017": (read_conll, {"mner": "T17"}, {
        "train": ("train.txt", 3373), "dev": ("valid.txt", 723), "test": ("test.txt", 723)}),
    "snap": (read_conll, {"mner": "SNAP"}, {
        "train": ("train.txt", 4290), "dev": ("valid.txt", 1432), "test": ("test.txt", 1459)}),
    "mnre_v1": (read_mnre, {"mre": "V1"}, {
        "train": ("ours_train.txt", 7824), "dev": ("ours_val.txt", 975),
        "test": ("ours_test.txt", 1282)}),
    "mnre_v2": (read_mnre, {"mre": "V2"}, {
        "train": ("mnre_train.txt", 12247), "dev": ("mnre_val.txt", 1624),
        "test": ("mnre_test.txt", 1614)}),
    "m2e2": (read_m2e2, {"med": "MED", "meae": "MEAE"}, {"test": ("crossmedia_coref.txt", 618)})}


def convert(kind: str, source: Path, corpus: Path) -> None:
    """Reads the published files of a dataset in `source` and writes corpus/kind."""
    reader, units, files = KINDS[kind]
    rows = {}
    for split, (name, expected) in files.items():
        spaced = source / name.replace(".txt", " .txt")       # as MNRE-V2's own dev file is called
        path = spaced if spaced.exists() else source / name
        if path.exists():
            rows[split] = reader(path, kind)
        found = f"{len(rows[split])} records found" if split in rows else "FILE NOT FOUND, left out"
        same = "" if len(rows.get(split, ())) == expected else "  <-- differs"
        print(f"{kind} {split}: {found}, {expected} expected, from {path}{same}")
    if not rows:
        raise DataError(f"{source}: expected at least one of "
                        f"{', '.join(name for name, _ in files.values())}, found none: "
                        "give the folder that holds them")
    write_dataset(corpus / kind, {"name": kind, "units": units, "labels": LABELS[kind]},
                  {split: [row for _, row in some] for split, some in rows.items()},
                  {split: [where for where, _ in some] for split, some in rows.items()})


def normalised(record: Record) -> str:
    """A text as duplicates are compared: no URLs, lower case, letters and digits only."""
    text = " ".join(token for token in record.tokens if not token.lower().startswith("http"))
    return "".join(filter(str.isalnum, text.lower()))


def check(corpus: Path, require_images: bool) -> None:
    """Validates every split of every dataset and prints what is in it."""
    problems = Problems()
    for name, dataset in load_datasets(corpus).items():
        texts, images = {}, corpus / name / "images"
        for split in (s for s in SPLITS if (corpus / name / f"{s}.jsonl").exists()):
            records = read_split(corpus / name, split, dataset, problems)
            texts[split] = set(map(normalised, records)) - {""}
            for task in dataset.units:
                some = [record for record in records if record.task == task]
                print(f"{name} {split} {task}: {summary(some, dataset, images)}")
            for record in records if require_images else ():
                if record.image and not (images / record.image).is_file():
                    problems.add(record.source, "image", f'"{record.image}" is not in {images}: '
                                 "put it there or write null")
        for a, b in combinations(texts, 2):
            print(f"{name}: {len(texts[a] & texts[b])} texts of {a} are in {b} too")
    problems.raise_if_any()


def summary(records: list[Record], dataset: Dataset, folder: Path) -> str:
    """The counts of one task's records in one split."""
    images = {record.image for record in records if record.image}
    missing = sum(not (folder / image).is_file() for image in images)
    prompts = max((len("".join(prompt(r, dataset)).split()) for r in records), default=0)
    targets = max((len(target(r).split()) for r in records), default=0)
    return (f"{len(records)} records, {sum(len(gold_items(r)) for r in records)} gold items, "
            f"{len(images)} images ({missing} missing), longest prompt {prompts} words, "
            f"longest target {targets} words")


def main(arguments: list[str] | None = None) -> int:
    """The command line of data.py; returns the exit code."""
    parser = argparse.ArgumentParser(prog="data.py", allow_abbrev=False, description="Convert "
                                     "published datasets, check a corpus (format: top of data.py)")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", allow_abbrev=False,
                                  help="read a dataset's published files and write DST/KIND")
    command.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    command.add_argument("src", type=Path, metavar="SRC", help="folder of the published files")
    command.add_argument("dst", type=Path, metavar="DST",
                         help="corpus folder; the pictures belong into DST/KIND/images")
    command = commands.add_parser("check", allow_abbrev=False,
                                  help="validate a corpus; print counts, duplicates, lengths")
    command.add_argument("dir", type=Path, metavar="DIR", help="corpus folder")
    command.add_argument("--require-images", action="store_true",
                         help="a missing picture is an error instead of a count")
    args = parser.parse_args(arguments)
    try:
        if args.command == "convert":
            convert(args.kind, args.src, args.dst)
        else:
            check(args.dir, args.require_images)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
