"""Datasets, records and corpora that the tests of schema, data and converters share."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece

import data
from data import Item
from engine.schema import Dataset, Record

TWEETS = Dataset("tweets", {"mner": "T17"}, {"mner": ["location", "person"]})
PAIRS = Dataset("pairs", {"mre": "V2"}, {"mre": ["couple", "held on", "held on (event)", "none"]})
ROLES = {"attack": ["attacker", "place", "target"], "phone write": ["entity"]}
NEWS = Dataset("news", {"med": "MED", "meae": "MEAE"}, {"med": sorted(ROLES), "meae": ROLES})
BOXES = ((1, 190, 508, 353), (10, 10, 50, 50))


def tweet(text: str, *spans: tuple[str, int, int]) -> Record:
    """An mner record from blank-separated words and (type, start, end)."""
    return Record("t", "tweets", "mner", tuple(text.split(" ")),
                  entities=tuple({"type": t, "start": s, "end": e} for t, s, e in spans))


def pair(text: str, head: tuple, relation: str, tail: tuple) -> Record:
    return Record("p", "pairs", "mre", tuple(text.split(" ")), head=head, relation=relation,
                  tail=tail)


def event(kind: str, trigger: tuple | None, *arguments: tuple) -> dict:
    """arguments: (role, span) for text, (role, box, object) for the image."""
    named = [{"role": a[0], "span": a[1]} if len(a) == 2 else
             {"role": a[0], "box": a[1], "object": a[2]} for a in arguments]
    return {"type": kind, "trigger": trigger, "arguments": tuple(named)}


def news(task: str, text: str, *events: dict) -> Record:
    return Record(f"n/{task}", "news", task, tuple(text.split(" ")) if text else (), "a.jpg",
                  (600, 400), BOXES, events=events)


STRIKE = "the coalition said an airstrike hit Kobani"
KOBANI = event("attack", (4, 5), ("target", BOXES[0], 1), ("attacker", (1, 2)))


MNER = {"id": "1", "dataset": "tweets", "task": "mner", "tokens": ["Bob", "is", "in", "Rome"],
        "image": "1.jpg", "size": [100, 50], "objects": [[1, 2, 30, 40]],
        "entities": [{"type": "person", "start": 0, "end": 1}]}
MRE = {"id": "1", "dataset": "pairs", "task": "mre", "tokens": ["a", "b"], "image": None,
       "size": None, "objects": [], "head": [0, 1], "tail": [1, 2], "relation": "none"}
MEAE = {"id": "1", "dataset": "news", "task": "meae", "tokens": ["a", "b"], "image": "x/1.png",
        "size": [100, 50], "objects": [[1, 2, 30, 40]],
        "events": [{"type": "attack", "trigger": [0, 1], "arguments": [
            {"role": "target", "box": [1, 2, 30, 41], "object": 1},
            {"role": "place", "box": [1, 2, 3, 4], "object": None},
            {"role": "attacker", "span": [1, 2]}]}]}
SAMPLES = {"tweets": MNER, "pairs": MRE, "news": MEAE}


def write_corpus(root: Path, lines: dict[str, list], split: str = "train") -> Path:
    """Writes {dataset: [JSON object or raw bytes, ...]} with the descriptors of this file."""
    for dataset in (TWEETS, PAIRS, NEWS):
        folder = root / dataset.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(
            {"name": dataset.name, "units": dataset.units, "labels": dataset.labels}))
        rows = [line if isinstance(line, bytes) else json.dumps(line).encode()
                for line in lines.get(dataset.name, ())]
        if rows:
            (folder / f"{split}.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    return root


def rows(*records: dict) -> list[tuple[str, dict]]:
    """Records beside the places that they come from."""
    return [(f"source:{number}", record) for number, record in enumerate(records, 1)]


def changed(row: dict, path: str, value: object) -> dict:
    """A deep copy with row[path] set (value) or deleted (...); path "events.0.type"."""
    copy = json.loads(json.dumps(row))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = copy
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return copy


def facts(found: list[Item], written: Callable[[str], str] = data.canon) -> list[tuple]:
    """What an item says, without where it is."""
    return [(item.label, item.role, item.text and written(item.text), item.object, item.event)
            for item in found]


def assert_reads_back(record: Record, dataset: Dataset) -> None:
    written = data.target(record)
    found, malformed = data.parse(record.task, written, dataset.labels[record.task])
    assert malformed == 0, written
    assert facts(found) == facts([item for item in data.gold_items(record)
                                         if item.text is not None or record.task == "mre"]), written


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The numbers and values of a protobuf message's fields; of whole numbers b""."""
    def varint(at: int) -> tuple[int, int]:
        value, shift = 0, 0
        while message[at] > 127:
            value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
        return value | message[at] << shift, at + 1

    at = 0
    while at < len(message):
        key, at = varint(at)
        length, at = varint(at) if key & 7 != 5 else (4, at)
        end = at if key & 7 == 0 else at + length
        yield key >> 3, message[at:end]
        at = end


def tokenizer_json(spiece: Path) -> dict:
    """What transformers 5.24 writes as tokenizer.json of the T5 with this spiece.model."""
    pieces = sentencepiece.SentencePieceProcessor(str(spiece))
    charsmap = dict(fields(dict(fields(spiece.read_bytes()))[3])).get(2, b"")
    vocab = [[pieces.id_to_piece(i), pieces.get_score(i)] for i in range(pieces.get_piece_size())]
    vocab += [[f"<extra_id_{k}>", 0.0] for k in reversed(range(100))]
    special = [i for i in range(len(vocab)) if i < 3 or vocab[i][0].startswith("<extra_id_")]
    marks = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
             "split": True}
    ends = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 0}}, ends[1]]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": vocab[i][0], "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True} for i in special],
        "normalizer": charsmap and {"type": "Precompiled", "precompiled_charsmap":
                                    base64.b64encode(charsmap).decode()} or None,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "WhitespaceSplit"}, marks]},
        "post_processor": {
            "type": "TemplateProcessing", "single": ends, "pair": ends + second,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": marks,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False}}
