"""T5's tokenizer from tokenizer.json, which transformers 5 writes in place of spiece.model.

It holds a sentencepiece model's pieces, their scores and the table by which text is normalised. The
model is rebuilt in protobuf's encoding, with the numbers of fields of sentencepiece_model.proto.
Tokens added behind T5's own are text, as beside a spiece.model."""

import base64
import struct
from pathlib import Path

from engine.files import WeightsError, note, read_json

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # types of pieces
SENTINELS = [f"<extra_id_{k}>" for k in reversed(range(100))]


def tokenizer_file(folder: Path) -> Path:
    """spiece.model in a model folder; where only a tokenizer.json lies there, that."""
    path, other = folder / "spiece.model", folder / "tokenizer.json"
    return other if other.is_file() and not path.exists() else path


def varint(number: int) -> bytes:
    """A whole number in groups of 7 bits, the lowest first."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message; bytes are a string or a message of their own."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def rebuilt(path: Path) -> bytes:
    """The sentencepiece model that the tokenizer.json of a T5 was made from, as it stands in
    spiece.model but for how it was trained.  WeightsError if the file says anything else."""
    raw = read_json(path)
    try:
        charsmap = charsmap_of(raw["normalizer"], raw["pre_tokenizer"])
        pieces = pieces_of(raw["model"], {one["content"]: one["id"] for one in raw["added_tokens"]})
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise WeightsError(f"{path}: expected a T5's tokenizer, as transformers 5 saves it, "
                           f"got {type(cause).__name__}: {cause}; copy spiece.model here from the "
                           "T5 that this one was made from") from None
    if not charsmap:
        note(f"{path}: its normalizer is null, as transformers 5.0.0 leaves it: no "
             "character is normalised; if the T5 was trained with a spiece.model, copy it here")
    return pieces + field(3, field(2, charsmap))


def pieces_of(model: dict, ids: dict[str, int]) -> bytes:
    """The pieces before the sentinels, each with text, score and type.  ids: of added tokens."""
    names, scores = zip(*model["vocab"])
    count = names.index(SENTINELS[0]) if SENTINELS[0] in names else len(names)
    types = dict.fromkeys(("<pad>", "</s>", "<s>"), CONTROL) | {names[model["unk_id"]]: UNKNOWN}
    added = [name for name, i in ids.items() if i < count and name not in types]
    if (model["type"] != "Unigram" or model.get("byte_fallback") or added
            or [ids.get(name) for name in SENTINELS] != [*range(count, count + 100)]
            or [*names[count:]] not in ([], SENTINELS) or any(not abs(x) < 1e9 for x in scores)):
        raise ValueError(f"{model['type']}, byte_fallback {model.get('byte_fallback')}, {count} "
                         f"pieces, of which {added[:4]} are added, {len(names) - count} behind")
    return b"".join(field(1, field(1, name.encode()) + field(2, float(score)) + field(
        3, types.get(name, NORMAL))) for name, score in zip(names[:count], scores))


def charsmap_of(normalizer: dict | None, splitter: dict) -> bytes:
    """The table of the normaliser; b"" without one.  Besides it only steps are known that do what
    sentencepiece does by itself: blanks are joined and stripped, and one is put before the text."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    tables = [step for step in steps if step["type"] != "Strip"
              and step.get("pattern") != {"Regex": " {2,}"}]
    marks = [step for step in splitter.get("pretokenizers", [splitter])
             if step["type"] != "WhitespaceSplit"]
    names = [step["type"] for step in tables + marks]
    if (names not in (["Precompiled", "Metaspace"], ["Metaspace"])
            or "never" in marks[0].values() or marks[0].get("add_prefix_space") is False):
        raise ValueError(f"normalizer and pre_tokenizer of {names}, {marks}"[:300])
    return base64.b64decode(tables[0]["precompiled_charsmap"], validate=True) if tables else b""
