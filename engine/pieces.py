"""T5's tokenizer from tokenizer.json, which transformers 5 writes in place of spiece.model.

It holds what matters of a sentencepiece model: the pieces, their scores, and the table by which
text is normalised.  From these the model is rebuilt, in the encoding of protobuf by hand: numbers
of fields are those of sentencepiece_model.proto.  Tokens that users have added behind T5's own are
ordinary text, as they are beside a spiece.model."""

import base64
import struct
from pathlib import Path
from typing import Any

from engine.files import WeightsError, read_json
from engine.settings import say_once

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # types of pieces
CONTROLS = ("<pad>", "</s>", "<s>")


def tokenizer_file(folder: Path) -> Path:
    """spiece.model in a model folder; where only a tokenizer.json lies there, that."""
    path, other = folder / "spiece.model", folder / "tokenizer.json"
    return other if other.is_file() and not path.exists() else path


def varint(number: int) -> bytes:
    """A whole number in groups of 7 bits, the lowest first."""
    more = number >> 7
    return bytes([number & 127 | 128]) + varint(more) if more else bytes([number])


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message; bytes are a string or a message of their own."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def rebuilt(path: Path) -> bytes:
    """The sentencepiece model that a T5's tokenizer.json was made from, as it stands in a
    spiece.model but for how it was trained.  WeightsError if the file says anything else."""
    raw = read_json(path)
    try:
        charsmap = charsmap_of(raw)
        model = b"".join(field(1, field(1, name.encode()) + field(2, float(score)) + field(3, sort))
                         for name, score, sort in pieces_of(raw)) + field(3, field(2, charsmap))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise WeightsError(f"{path}: expected the tokenizer of a T5, as transformers 5 saves it, got "
                           f"{type(cause).__name__}: {cause}; copy spiece.model here from the T5 "
                           "that this one was made from") from None
    if not charsmap:
        say_once(f"note: {path}: its normalizer is null, as transformers 5.0.0 leaves it: no "
                 "character is normalised; if the T5 was trained with a spiece.model, copy it here")
    return model


def pieces_of(raw: dict[str, Any]) -> list[tuple[str, float, int]]:
    """The pieces before the sentinels, (text, score, type) each."""
    model, ids = raw["model"], {token["content"]: token["id"] for token in raw["added_tokens"]}
    names = [piece for piece, _ in model["vocab"]]
    count = names.index("<extra_id_99>") if "<extra_id_99>" in names else len(names)
    sentinels = [f"<extra_id_{k}>" for k in reversed(range(100))]
    if model["type"] != "Unigram" or model.get("byte_fallback"):
        raise ValueError(f"a model of type {model['type']}, byte_fallback "
                         f"{model.get('byte_fallback')}, not Unigram without it")
    if ([ids.get(name) for name in sentinels] != [*range(count, count + 100)]
            or names[count:] not in ([], sentinels)):
        raise ValueError(f"other tokens than <extra_id_99> to <extra_id_0> behind {count} pieces")
    sorts = {name: CONTROL for name in CONTROLS} | {names[model["unk_id"]]: UNKNOWN}
    if not all(-1e9 < score < 1e9 for _, score in model["vocab"]):
        raise ValueError("scores that are no finite numbers")
    if odd := [name for name, i in ids.items() if i < count and name not in sorts]:
        raise ValueError(f"added tokens {odd[:4]} among the pieces")
    return [(name, score, sorts.get(name, NORMAL)) for name, score in model["vocab"][:count]]


def charsmap_of(raw: dict[str, Any]) -> bytes:
    """The table of the normaliser; b"" without one.  Besides it only steps are known that do what
    sentencepiece does by itself: blanks are joined and stripped, and one is put before the text."""
    normaliser, splitter = raw["normalizer"] or {"normalizers": []}, raw["pre_tokenizer"]
    tables = [step for step in normaliser.get("normalizers", [normaliser])
              if step["type"] != "Strip" and step.get("pattern") != {"Regex": " {2,}"}]
    marks = [step for step in splitter.get("pretokenizers", [splitter])
             if step["type"] != "WhitespaceSplit"]
    if [step["type"] for step in tables + marks] not in (["Precompiled", "Metaspace"],
                                                         ["Metaspace"]):
        raise ValueError(f"steps {[step['type'] for step in tables + marks]}, not Precompiled and "
                         "Metaspace")
    if marks[0].get("prepend_scheme") == "never" or marks[0].get("add_prefix_space") is False:
        raise ValueError("no blank before the first word")
    return base64.b64decode(tables[0]["precompiled_charsmap"], validate=True) if tables else b""
