"""Convert a published dataset into a dataset of a corpus, as engine/schema.py describes it.

    python -m tools.convert KIND SRC DST     KIND and the files that SRC holds:
        twitter2015, twitter2017, snap, bio  {train,valid,test}.txt (bio: your own, see read_conll)
        mnre_v1 | mnre_v2                    ours_{train,val,test}.txt | mnre_{train,val,test}.txt
        ace2005                              {train,dev}.oneie.json (licensed; OneIE's JSON lines)
        swig                                 {train,dev}.json, ace_sr_mapping.txt (of M2E2)
        m2e2_gold                            crossmedia_coref.txt, *_multimedia_event.json and, for
                                             "accepted", text_only_event.json
        m2e2                                 the same, m2e2_yolov8_objects.json

m2e2 is the detector mode and the one to report: objects are the --max-objects most confident
detections. m2e2_gold is the gold-box mode: objects are the gold boxes, which leaks their number.
ace2005 and swig train what m2e2 tests, with its event types and roles (--event-types all: theirs).

A converter writes DST/KIND; put (or link) the pictures into DST/KIND/images. For bio, KIND is here
the name of the folder SRC, and the labels are those of its files. Sources: Twitter-15/17
github.com/jefferyYu/UMT; SNAP (Lu et al., ACL 2018); MNRE github.com/thecharm/MNRE; M2E2
github.com/limanling/m2e2, its detections seebergerph/MMUTF; SWiG github.com/allenai/swig; ACE2005
from the LDC, as OneIE (Lin et al., ACL 2020) prepares it."""

import ast
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from engine.command import Parser
from engine.corpus import Rows, parse_json, read_filled, write_dataset
from engine.processes import exit_codes
from engine.schema import SIZE, SPLITS, DataError, box_within, iou, nearest, show

# ---------------------------------------------------------------------------- published files
# The fourth type is OTHER in Twitter-15 and MISC in Twitter-17.
TAGS = {"PER": "person", "LOC": "location", "ORG": "organization", "OTHER": "miscellaneous",
        "MISC": "miscellaneous"}
# The annotation schemes, not the labels of a training split: two of V1's occur in test only.
SHARED = """/loc/loc/contain /misc/loc/held_on /misc/misc/part_of /org/loc/locate_at
    /org/org/alternate_names /org/org/subsidiary /per/loc/place_of_birth /per/loc/place_of_residence
    /per/misc/awarded /per/misc/nationality /per/misc/present_in /per/misc/race /per/misc/religion
    /per/org/member_of /per/per/alternate_names /per/per/charges /per/per/couple /per/per/neighbor
    /per/per/parent /per/per/peer /per/per/siblings""".split()
RELATIONS = {
    "mnre_v1": [*SHARED, *"""none /loc/loc/administration_divisions /loc/loc/capital
        /misc/misc/held_on /per/loc/place_of_death /per/misc/creat /per/org/founder_of
        /per/org/leader /per/per/classmate /per/per/colleague /per/per/relative""".split()],
    "mnre_v2": [*SHARED, "None", "/per/per/alumi"]}
RENAMED = {"None": "none", "/per/per/alumi": "alumni", "/misc/misc/held_on": "held on (event)",
           "/per/per/alternate_names": "alternate names (person)",
           "/org/org/alternate_names": "alternate names (organization)"}
ACE_TYPES = """Business:Declare-Bankruptcy Business:End-Org Business:Merge-Org Business:Start-Org
    Conflict:Attack Conflict:Demonstrate Contact:Meet Contact:Phone-Write Justice:Acquit
    Justice:Appeal Justice:Arrest-Jail Justice:Charge-Indict Justice:Convict Justice:Execute
    Justice:Extradite Justice:Fine Justice:Pardon Justice:Release-Parole Justice:Sentence
    Justice:Sue Justice:Trial-Hearing Life:Be-Born Life:Die Life:Divorce Life:Injure Life:Marry
    Movement:Transport Personnel:Elect Personnel:End-Position Personnel:Nominate
    Personnel:Start-Position Transaction:Transfer-Money Transaction:Transfer-Ownership""".split()
M2E2 = {event: roles.split() for event, roles in {  # eight of these types, with their roles
    "attack": "attacker instrument place target", "demonstrate": "entity instrument place police",
    "meet": "entity place", "phone write": "entity instrument place",
    "arrest jail": "agent instrument person place", "die": "agent instrument place victim",
    "transport": "agent artifact destination origin vehicle",
    "transfer money": "giver money recipient"}.items()}
# Two rows of ace_sr_mapping.txt that contradict the 225 others (what is carried is no agent, who
# steers is no vehicle). Its type "Transfer|MONEY" needs no entry, as labels are lower-case words.
ROLE_FIXES = {("carrying", "item"): "Artifact", ("steering", "agent"): "Agent"}


def relation_word(path: str) -> str:
    """"/per/loc/place_of_birth" -> "place of birth"; injective within a dataset."""
    return RENAMED.get(path, path.split("/")[-1].replace("_", " "))


def event_word(name: str) -> str:
    """"Justice:Arrest-Jail" -> "arrest jail"."""
    return name.split(":")[1].replace("-", " ").lower()


def raw_record(dataset: str, **fields: object) -> dict:
    """A record as JSON; what `fields` do not hold is empty or unknown."""
    return {"id": "", "dataset": dataset, "task": "", "tokens": [], "image": None, "size": None,
            "objects": [], **fields}


@contextmanager
def expecting(what: str, where: object, line: str | None = None) -> Iterator[None]:
    """Turn any failure to read `what` into an error that says where, and quotes the line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        got = repr(error) if line is None else f"{show(line)} ({error!r})"
        raise DataError(f"{where}: expected {what}, got {got}: fetch the file again (for your own "
                        "data see docs/data.md)") from None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of a UTF-8 file; only LF and CRLF end a line."""
    for number, line in enumerate(read_filled(path).removesuffix(b"\n").split(b"\n"), 1):
        try:
            yield f"{path}:{number}", line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error}): save it as UTF-8") from None


def read_conll(path: Path, dataset: str, published: bool = True) -> Rows:
    """`IMGID:name`, then token<TAB>tag lines, then a blank line.  An I- tag that continues nothing
    starts an entity, as the scorers of the field have it (Twitter-15 has hundreds of them).  The
    second tweet with the picture NAME has the id NAME-2, and so on.  A name without .jpg, .png or
    the like is that of a .jpg.  Files of one's own may have any labels (BRAND_NAME becomes "brand
    name") and texts without an IMGID line, which show no picture."""
    rows, ids, copies, inside = [], set(), Counter(), False
    for where, line in read_lines(path):
        token, tab, tag = line.rpartition("\t")
        mark, _, label = tag.partition("-")
        label = TAGS.get(label) if published else label.lower().replace("_", " ")
        header = line.startswith("IMGID:") and not tab
        if header or line and not inside and not published:
            name = line.removeprefix("IMGID:").strip() if header else where.rpartition(":")[2]
            image = name + ".jpg" * (not re.search(r"\.(jpe?g|png|gif|webp)$", name, re.I))
            copies[name] += 1
            numbered = (f"{name}-{n}" if n > 1 else name for n in itertools.count(copies[name]))
            ids.add(new := next(one for one in numbered if one not in ids))
            rows.append((where, raw_record(dataset, id=new, task="mner", entities=[],
                                           image=image if header else None)))
        inside = bool(line and (header or inside or not published))
        if line and not header:
            if not inside or not token or tag != "O" and not (mark in ("B", "I") and label):
                raise DataError(
                    f"{where}: expected token<TAB>tag below an IMGID line, tag O or B-/I- and one "
                    f"of {', '.join(TAGS)} (KIND bio: any), got {show(line)}: correct the file")
            tokens, entities = rows[-1][1]["tokens"], rows[-1][1]["entities"]
            tokens.append(token)
            start, end = len(tokens) - 1, len(tokens)
            last = entities[-1] if entities else {}
            if mark == "I" and (last.get("type"), last.get("end")) == (label, start):
                last["end"] = end
            elif mark != "O":
                entities.append({"type": label, "start": start, "end": end})
    if shared := len(rows) - len({row["image"] or row["id"] for _, row in rows}):
        print(f"{path}: {shared} tweets show the picture of one before; their ids are numbered")
    return rows


def read_mnre(path: Path, dataset: str) -> Rows:
    """One Python literal per line. Names come from the offsets; V1's image ids may be numbers."""
    rows = []
    for number, (where, line) in enumerate(read_lines(path), 1):
        with expecting("a Python dict with token, h, t, img_id, relation", where, line):
            row = ast.literal_eval(line)
            relation, image = row["relation"], row["img_id"]
            if relation not in RELATIONS[dataset]:
                raise ValueError(f"relation {show(relation)} is not in the scheme of {dataset}: "
                                 + nearest(relation, RELATIONS[dataset]))
            image = f"{image}.jpg" if type(image) is int else image
            if not isinstance(image, str):
                raise ValueError(f"img_id {show(image)} names no picture")
            rows.append((where, raw_record(
                dataset, id=f"{number}", task="mre", tokens=row["token"], image=image,
                head=row["h"]["pos"], tail=row["t"]["pos"], relation=relation_word(relation))))
    return rows


# Readers of events return one row per sample, without a task and with the gold boxes as objects.
# event_rows() makes of it a med and a meae record with the objects that the model is to see.

def text_event(mention: dict) -> dict:
    """An event in M2E2's or ACE's text; only its offsets are used, not the words beside them."""
    name, trigger = mention["event_type"], mention["trigger"]
    if name not in ACE_TYPES:
        raise ValueError(f"event type {show(name)} is unknown: {nearest(name, ACE_TYPES)}")
    return {"type": event_word(name), "trigger": [trigger["start"], trigger["end"]], "arguments": [
        {"role": a["role"].lower(), "span": [a["start"], a["end"]]} for a in mention["arguments"]]}


def read_ace(path: Path, dataset: str) -> Rows:
    """A sample for each line of OneIE's JSON lines, also for sentences without event; no pictures.
    An argument lies where the entity mention lies that it names."""
    rows = []
    for where, line in read_lines(path):
        with expecting("a sentence as OneIE writes it (doc_id, sent_id, tokens, entity_mentions, "
                       "event_mentions)", where, line):
            sentence = parse_json(line.encode())
            mentions = {mention["id"]: mention for mention in sentence["entity_mentions"]}
            for argument in (a for event in sentence["event_mentions"] for a in event["arguments"]):
                if (name := argument["entity_id"]) not in mentions:
                    raise ValueError(f"entity_id {show(name)} of an argument is none of the "
                                     "entity_mentions")
                argument |= {key: mentions[name][key] for key in ("start", "end")}
            document, name = sentence["doc_id"], str(sentence["sent_id"])
            if not name.startswith(document):  # the number of the sentence in its document
                name = f"{document}-{name}"
            rows.append((where, raw_record(
                dataset, id=name, tokens=sentence["tokens"],
                events=list(map(text_event, sentence["event_mentions"])))))
    return rows


def read_text_only(folder: Path, sentences: dict[str, dict]) -> dict[str, list[dict]]:
    """{sentence id: its events in M2E2's text-only file}, of these sentences; {} without file.
    A sentence that has other words there is left out, since its offsets would mean nothing."""
    path = folder / "text_only_event.json"
    if not path.exists():
        print(f"{path} is not here, so no other event is accepted")
        return {}
    with expecting("M2E2's text-only events", path):
        return {one["sentence_id"]: list(map(text_event, one["golden-event-mentions"]))
                for one in parse_json(read_filled(path)) if one["golden-event-mentions"]
                and one["words"] == sentences.get(one["sentence_id"], {}).get("words")}


def read_m2e2(path: Path, dataset: str) -> Rows:
    """A sample for each line of crossmedia_coref.txt: the one event of a sentence, and a picture.
    Where line and picture disagree about the event type, the arguments in the picture are dropped.
    Other events of the sentence, from M2E2's text-only file, become "accepted", not gold."""
    texts, images = (path.with_name(f"{what}_multimedia_event.json") for what in ("text", "image"))
    with expecting("M2E2's annotations", path.parent):
        sentences = {one["sentence_id"]: one for one in parse_json(read_filled(texts))}
        pictures = parse_json(read_filled(images))
    rows, accepted = [], read_text_only(path.parent, sentences)
    for where, line in read_lines(path):
        with expecting("sentence<TAB>image.jpg<TAB>event type, all annotated", where, line):
            name, image, coref = line.split("\t")
            sentence, picture = sentences[name], pictures[image.removesuffix(".jpg")]
            boxes = [(role, box[1:]) for role, shown in picture["role"].items() for box in shown]
            for _, box in boxes:
                if not box_within().holds(box):
                    raise ValueError(f"{show(box)} {box_within().problem}")
            [mention] = sentence["golden-event-mentions"]
            event = text_event(mention)
            if coref == picture["event_type"]:
                event["arguments"] += [{"role": role.lower(), "box": box} for role, box in boxes]
            others = {"accepted": accepted[name]} if name in accepted else {}
            rows.append((where, raw_record(
                dataset, id=f"{name}+{image}", tokens=sentence["words"], image=image,
                objects=[box for _, box in boxes], events=[event], **others)))
    several = sum("accepted" in row for _, row in rows)
    print(f"{dataset}: {several} of {len(rows)} samples have other events in their sentence, which "
          f"are accepted ({len(accepted)} sentences)")
    return rows


def read_mapping(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """{verb: (event type, {SWiG's role: role})} from M2E2's ace_sr_mapping.txt, LF or CRLF."""
    verbs = {}
    for where, line in read_lines(path):
        with expecting("verb<TAB>role<TAB>Type||Sub|Type<TAB>ACE role", where, line):
            verb, name, event, role = line.split("\t")
            event = event_word(event.replace("||", ":").replace("|", "-"))
            if event not in M2E2 or verbs.setdefault(verb, (event, {}))[0] != event:
                raise ValueError(f"{event} is no type of M2E2, or {verb} has another one above")
            verbs[verb][1][name] = ROLE_FIXES.get((verb, name), role).lower()
    return verbs


def read_swig(path: Path, dataset: str) -> Rows:
    """A sample without text for each picture whose verb is mapped; the whole picture triggers.
    SWiG's verb template is not used as text, as it gives the verb away. Objects are the grounded
    boxes, whatever their role; two roles may share one. [-1, -1, -1, -1] is not grounded."""
    verbs, rows, flat = read_mapping(path.with_name("ace_sr_mapping.txt")), [], 0
    with expecting("SWiG's {image: {verb, height, width, bb}}", path):
        pictures = dict(parse_json(read_filled(path)))
    for image, picture in pictures.items():
        where = f"{path}: {image}"
        with expecting("{verb, height, width, bb: {role: box}}", where):
            if picture["verb"] not in verbs:
                continue
            event, roles = verbs[picture["verb"]]
            if not SIZE.holds(size := [picture["width"], picture["height"]]):
                raise ValueError(f"the size {size}")
            tidied = {name: tidy(box, *size) for name, box in picture["bb"].items()
                      if max(box) >= 0}
            boxes = {name: box for name, box in tidied.items() if box}
            flat += len(tidied) - len(boxes)
            arguments = unique([{"role": roles[name], "box": box} for name, box in boxes.items()
                                if name in roles])
            rows.append((where, raw_record(
                dataset, id=image, image=image, size=size, objects=unique(list(boxes.values())),
                events=[{"type": event, "trigger": None, "arguments": arguments}])))
    print(f"{path}: {len(pictures) - len(rows)} of {len(pictures)} pictures left out (verb unmapped"
          f"); {flat} boxes without area dropped")
    return rows


# ---------------------------------------------------------------------------- objects of pictures
def unique(values: list) -> list:
    """The values without repetitions, which need not be hashable."""
    return [value for i, value in enumerate(values) if value not in values[:i]]


def tidy(box: list, right: float = math.inf, bottom: float = math.inf) -> list | None:
    """A box with its corners in order, clipped to the picture; None where no area is left."""
    (x1, x2), (y1, y2) = sorted(box[::2]), sorted(box[1::2])
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, right), min(y2, bottom)
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def shown_by(box: list, objects: list[list]) -> int | None:
    """The number of the object that overlaps a box most, if IoU >= 0.5; ties go to the first."""
    overlap, number = max(((iou(box, other), -k) for k, other in enumerate(objects, 1)),
                          default=(0, 0))
    return -number if overlap >= 0.5 else None


def detections(path: Path) -> dict[str, list[list]]:
    """{image: boxes of its detections, the most confident first}, corners in order and clipped at 0
    (the size of a picture is not known); boxes without area are dropped and counted."""
    if not path.exists():
        raise DataError(f"{path}: expected what YOLOv8 detects in M2E2's pictures, {{image.jpg: "
                        '[{"bbox", "class", "conf"}]}, found no file: put MMUTF\'s objects '
                        "(github.com/seebergerph/MMUTF) there as JSON, or convert m2e2_gold")
    with expecting('{image.jpg: [{"bbox", "class", "conf"}]}', path):
        detected = {image: [tidy(one["bbox"]) for one in sorted(ones, key=lambda x: -x["conf"])]
                    for image, ones in parse_json(read_filled(path)).items()}
    flat = sum(box is None for boxes in detected.values() for box in boxes)
    print(f"{path}: detections in {len(detected)} pictures; {flat} without area dropped")
    return {image: [box for box in boxes if box] for image, boxes in detected.items()}


def reachable(rows: Rows, detected: dict[str, list[list]], limit: int) -> tuple[int, int]:
    """(gold boxes that one of `limit` detections shows, gold boxes), each picture counted once."""
    gold = {row["image"]: row["objects"] for _, row in rows}
    best = [shown_by(box, detected[image][:limit]) for image, boxes in gold.items()
            for box in boxes]
    return len(best) - best.count(None), len(best)


def mixed(row: dict, count: int) -> list[list]:
    """`count` objects, in tiny pictures fewer: the grounded boxes and distractors, in an order that
    tells nothing. A distractor has the sides of a grounded box times 0.5 to 1.5, lies anywhere in
    the picture and overlaps no grounded box with IoU >= 0.5. The picture's name is the seed."""
    rng, (right, bottom), objects = random.Random(row["image"]), row["size"], row["objects"][:]
    for _ in range(100 * count):
        if len(objects) >= count:
            break
        x1, y1, x2, y2 = rng.choice(row["objects"] or [[0, 0, right, bottom]])
        width = min(math.ceil((x2 - x1) * rng.uniform(0.5, 1.5)), right)
        height = min(math.ceil((y2 - y1) * rng.uniform(0.5, 1.5)), bottom)
        x, y = rng.randint(0, right - width), rng.randint(0, bottom - height)
        box = [x, y, x + width, y + height]
        if box not in objects and shown_by(box, row["objects"]) is None:
            objects.append(box)
    rng.shuffle(objects)
    return objects[:count]


# ---------------------------------------------------------------------------- converters
class Published(NamedTuple):
    """A published dataset: the function that reads its files, and what is known about it."""
    read: Callable[[Path, str], Rows]
    units: dict[str, str]  # as in Dataset
    labels: dict
    files: dict[str, str]  # of each split
    counts: tuple[int | None, ...] = (None, None, None)  # records of each split, where known
    note: str = ""  # {objects}, {types}: options


TWITTER = {"mner": sorted(set(TAGS.values()))}
V1, V2 = ({"mre": sorted(map(relation_word, paths))} for paths in RELATIONS.values())
EVENTS = {"med": sorted(M2E2), "meae": M2E2}
MEE = {"med": "MED", "meae": "MEAE"}
FOREIGN = ("ace2005", "swig")  # these train what M2E2 tests
DETECTIONS = "m2e2_yolov8_objects.json"
TWEETS = dict(zip(SPLITS, ("train.txt", "valid.txt", "test.txt")))
V1_FILES, V2_FILES = (dict(zip(SPLITS, (f"{name}_train.txt", f"{name}_val.txt",
                                         f"{name}_test.txt"))) for name in ("ours", "mnre"))
PAIRS = {"test": "crossmedia_coref.txt"}
PUBLISHED = {
    "twitter2015": Published(read_conll, {"mner": "T15"}, TWITTER, TWEETS, (4000, 1000, 3257)),
    "twitter2017": Published(read_conll, {"mner": "T17"}, TWITTER, TWEETS, (3373, 723, 723)),
    "snap": Published(read_conll, {"mner": "SNAP"}, TWITTER, TWEETS, (4290, 1432, 1459)),
    "bio": Published(partial(read_conll, published=False), {"mner": "T15"}, {}, TWEETS),
    "mnre_v1": Published(read_mnre, {"mre": "V1"}, V1, V1_FILES, (7824, 975, 1282)),
    "mnre_v2": Published(read_mnre, {"mre": "V2"}, V2, V2_FILES, (12247, 1624, 1614)),
    "ace2005": Published(
        read_ace, MEE, EVENTS, {"train": "train.oneie.json", "dev": "dev.oneie.json"}, (None, None),
        "ACE2005 with event types {types}, sentences without event included, no test file"),
    "swig": Published(
        read_swig, MEE, EVENTS, {"train": "train.json", "dev": "dev.json"}, (None, 6700),
        "SWiG with event types {types}: pictures without text, {objects} objects each (grounded "
        "boxes and distractors, shuffled), no test file, two rows of the role mapping corrected"),
    "m2e2": Published(
        read_m2e2, MEE, EVENTS, PAIRS, (618,),
        "M2E2 in detector mode: objects are the {objects} most confident YOLOv8 detections"),
    "m2e2_gold": Published(
        read_m2e2, MEE, EVENTS, PAIRS, (618,),
        "M2E2 in gold-box mode: objects are exactly the gold boxes in file order, which leaks "
        "their number")}


def published_file(source: Path, name: str) -> Path:
    """The path of a file; MNRE-V2's dev file may have a blank in its name, OneIE's no "oneie"."""
    names = (name.replace(".txt", " .txt"), name, name.replace(".oneie", ""),
             name.replace("valid.txt", "dev.txt"))
    return next((source / other for other in names if (source / other).exists()), source / name)


def keep_m2e2(rows: Rows) -> None:
    """Drop events and roles that M2E2 does not have, and print how many of which."""
    lost = Counter()
    for _, row in rows:
        lost.update(e["type"] for e in row["events"] if e["type"] not in M2E2)
        row["events"] = [event for event in row["events"] if event["type"] in M2E2]
        for event in row["events"]:
            name, roles, arguments = event["type"], M2E2[event["type"]], event["arguments"]
            lost.update(f"{a['role']} of {name}" for a in arguments if a["role"] not in roles)
            event["arguments"] = [a for a in arguments if a["role"] in roles]
    if lost:
        print("left out, as M2E2 has no such event or role:",
              ", ".join(f"{count} x {name}" for name, count in lost.most_common()))


def event_rows(dataset: str, rows: Rows, folder: Path, max_objects: int,
               event_types: str) -> tuple[Rows, str]:
    """(med and meae records of samples with the objects of this dataset, what a result must name).
    Every sample has a med record, "none" where it has no event; a meae record needs an event."""
    note = PUBLISHED[dataset].note.format(objects=max_objects, types=event_types)
    if dataset in FOREIGN and event_types == "m2e2":
        keep_m2e2(rows)
    if dataset == "m2e2":
        detected = detections(folder / DETECTIONS)
        with expecting("detections, if only [], for each picture of M2E2", folder / DETECTIONS):
            reached, total = reachable(rows, detected, max_objects)
        share = 100 * reached / max(total, 1)
        note += f"; they show {reached} of {total} gold boxes ({share:.1f} %)"
    print(f"{dataset}: {note}")
    for _, row in rows:
        if dataset == "m2e2":
            row["objects"] = detected[row["image"]][:max_objects]
        elif dataset == "swig":
            row["objects"] = mixed(row, max_objects)
        for argument in (a for event in row["events"] for a in event["arguments"] if "box" in a):
            argument["object"] = shown_by(argument["box"], row["objects"])
    return [(where, row | {"id": f"{row['id']}/{task}", "task": task}) for where, row in rows
            for task in ("med", "meae") if task == "med" or row["events"]], note


def refuse(dataset: str, corpus: Path, max_objects: int, event_types: str) -> None:
    """DataError where the folder or the options make no sense for this dataset."""
    other = {"m2e2": "m2e2_gold", "m2e2_gold": "m2e2"}.get(dataset, "")
    if other and (corpus / other / "dataset.json").exists():
        raise DataError(f"{corpus}: holds {other}, which would be scored together with {dataset}: "
                        "give another folder")
    if (corpus / "dataset.json").exists():
        raise DataError(f"{corpus}: expected a folder of datasets, found a single dataset: give "
                        "the folder above it")
    if max_objects < 1:
        raise DataError(f"--max-objects: expected 1 or more, got {max_objects}: raise it")
    if event_types == "all" and dataset not in FOREIGN:
        raise DataError(f"--event-types all: {dataset} has one set of labels only: leave it out")


def convert(dataset: str, source: Path, corpus: Path, max_objects: int = 16,
            event_types: str = "m2e2") -> None:
    """Read the published files of a dataset in `source` and write corpus/dataset.  max_objects:
    of a picture in m2e2 and swig.  event_types: those of "m2e2" or, for ace2005 and swig, "all"."""
    refuse(dataset, corpus, max_objects, event_types)
    entry, dataset = PUBLISHED[dataset], source.resolve().name if dataset == "bio" else dataset
    paths = {split: published_file(source, name) for split, name in entry.files.items()}
    rows = {split: entry.read(path, dataset) for split, path in paths.items() if path.exists()}
    if not rows:
        raise DataError(f"{source}: expected at least one of {', '.join(entry.files.values())}, "
                        "found none: give the folder that holds them")
    types = {e["type"] for _, row in sum(rows.values(), []) for e in row.get("entities", ())}
    descriptor = {"name": dataset, "units": entry.units,
                  "labels": entry.labels or {"mner": sorted(types)}}
    if event_types == "all":  # those of its samples
        events = [event for _, row in sum(rows.values(), []) for event in row["events"]]
        roles = {name: sorted({a["role"] for e in events if e["type"] == name
                               for a in e["arguments"]})
                 for name in sorted({event["type"] for event in events})}
        descriptor["labels"] = {"med": list(roles), "meae": roles}
    if entry.units == MEE:
        for split, samples in rows.items():
            rows[split], descriptor["note"] = event_rows(dataset, samples, source, max_objects,
                                                         event_types)
    for (split, path), expected in zip(paths.items(), entry.counts):
        count = len(rows.get(split, ()))
        read = f"{count} records found" if split in rows else "FILE NOT FOUND, nothing written"
        wanted = f", {expected} expected" * bool(expected)
        differs = "  <-- differs" * (expected not in (None, count))
        print(f"{dataset} {split}: {read}{wanted}, from {path}{differs}")
    if "test" not in entry.files and (path := published_file(source, "test.oneie.json")).exists():
        print(f"{dataset} test: {path} left out, as M2E2 is the only test of events")
    write_dataset(corpus / dataset, descriptor, rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.convert", description="Read the published files of a "
                    "dataset, write DST/KIND, print the counts of records read and expected.")
    add = parser.add_argument_group("what to convert").add_argument
    add("kind", choices=PUBLISHED, metavar="KIND", help=", ".join(PUBLISHED))
    add("src", type=Path, metavar="SRC", help="folder of the published files")
    add("dst", type=Path, metavar="DST",
        help="corpus folder; the pictures belong into DST/KIND/images")
    add = parser.add_argument_group("events").add_argument
    add("--max-objects", type=int, default=16, metavar="K", help="m2e2, swig: objects of a picture")
    add("--event-types", choices=("m2e2", "all"), default="m2e2",
        help="ace2005, swig: event types and roles of M2E2, or all in their files")
    args = parser.parse_args(argv)
    with exit_codes():
        convert(args.kind, args.src, args.dst, args.max_objects, args.event_types)


if __name__ == "__main__":
    main()
