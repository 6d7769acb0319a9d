"""The demo: a small drawn world for all seven units, and the making of a tiny T5 and a tiny ViT.

The world is a generated corpus in the unified schema of data.py: short texts about made-up names,
each with a drawn picture. What makes it worth training on:
  - the picture is needed: many mentions, pairs and triggers read the same whatever they are; only
    what is drawn beside them decides the type, the relation, the event, and which box has a role;
  - the tasks share names, words and symbols, and disagree about their meaning (MEANING below);
  - the units differ in size, and every split has its own names, so names must be copied.

The tiny backbone is made as its big sisters were: a T5 v1.1 layout trained by span corruption
(Raffel et al., arXiv 1910.10683) and generic text-to-text instructions on random words (as flan-t5,
arXiv 2210.11416), and a ViT (arXiv 2010.11929) trained to classify drawings. Neither sees a label
of any task. Both are saved in the HF layout and loaded as any other size.

Letters: B batch, S source tokens, T target tokens, C vocabulary.

    python demo.py DST [--seed 0]       writes the world's corpus into DST
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable

import sentencepiece
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from data import Tokenizer
from t5 import T5, Attention, T5Config
from vision import ViT, ViTConfig, crop, preprocess


# ------------------------------------------------------------------ constants of the world

@dataclass(frozen=True)
class Difficulty:
    """What makes the world harder; every value is a probability."""

    ambiguous: float = 0.8  # a text holds something that only the picture decides
    blank: float = 0.03  # ... and the picture lacks it: an error nobody can avoid
    clutter: float = 0.5  # a meaningless thing is drawn beside the others
    empty: float = 0.1  # a text without entity, pair without relation, pair without event


# Reference scores p_m of eq. 9 for the demo: dev F1 of one plain LoRA trained on that unit alone.
P_M = {"T15": 85.0, "T17": 85.0, "SNAP": 85.0, "V1": 85.0, "V2": 85.0, "MED": 85.0, "MEAE": 75.0}

SIZES = {"T15": 900, "T17": 500, "SNAP": 700, "V1": 600, "V2": 1500, "MEE": 1000}  # train records
SPLITS = {"train": None, "dev": 60, "test": 150}
COLOURS = {"red": (214, 40, 40), "blue": (40, 80, 214), "green": (40, 160, 70),
           "yellow": (236, 190, 30)}
GLYPHS = ("figure", "house", "flag", "car", "blade", "tree")  # a tree never means anything
PAPER = ((250, 250, 245), (225, 235, 245), (240, 228, 220), (228, 240, 226))
SIDE, MAX_OBJECTS = 64, 4

# One drawing, three meanings: the tasks read the same symbols differently, on purpose.
MEANING = {
    "mner": {"figure": "person", "house": "location", "flag": "organization", "car": "other"},
    "mre": {"flag": "member of", "house": "residence"},  # and figures: couple if red, else peer
    "mee": {"blade": "attack", "flag": "demonstrate", "house": "meet", "car": "transport"},
}
ROLES = {"attack": ("attacker", "target"), "demonstrate": ("demonstrator", "place"),
         "meet": ("participant", "place"), "transport": ("passenger", "vehicle")}
V_LABELS = {"V1": ("couple", "member of", "none", "peer"),
            "V2": ("member of", "none", "peer", "residence")}

VAGUE = ("so proud of {}", "look at {}", "{} looks great", "waiting for {}", "love {} today")
CLEAR = {"person": ("says coach {}", "singer {} smiled", "{} joined us"),
         "location": ("downtown {} is busy", "rain near {}", "we drove to {}"),
         "organization": ("club {} won", "{} hired staff", "shares of {} fell"),
         "other": ("film {} opens", "the {} award", "reading {} now")}
IDLE = ("good morning everyone", "what a busy day", "rain again today", "so tired of waiting",
        "we won today", "nothing to see here")
PAIR_VAGUE = ("{} with {} today", "{} and {} again", "great day for {} and {}")
PAIR_CLEAR = {"couple": ("{} married {}", "{} loves {}"), "peer": ("{} met {}", "{} faced {}"),
              "member of": ("{} joined {}", "{} signed for {}"),
              "residence": ("{} moved to {}", "{} is home in {}")}
THIRD = ("says {}", "near {}", "thanks {}")
TRIGGERS = {"attack": ("struck", "bombed"), "demonstrate": ("protested", "marched"),
            "meet": ("met", "hosted"), "transport": ("drove", "boarded")}
VAGUE_TRIGGERS = ("joined", "faced", "moved", "took")


# ------------------------------------------------------------------ drawing

def draw_glyph(draw: ImageDraw.ImageDraw, glyph: str, box: tuple, colour: tuple) -> None:
    """Draws one of GLYPHS into box (x1, y1, x2, y2), in pixels."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x1 + px * w, y1 + py * h) for px, py in points]

    if glyph == "figure":
        draw.ellipse(at((.3, 0), (.7, .35)), fill=colour)
        draw.polygon(at((.5, .3), (.9, .7), (.65, .65), (.75, 1), (.25, 1), (.35, .65), (.1, .7)),
                     fill=colour)
    elif glyph == "house":
        draw.polygon(at((0, .45), (.5, 0), (1, .45)), fill=(90, 60, 50))
        draw.rectangle(at((.1, .45), (.9, 1)), fill=colour)
        draw.rectangle(at((.4, .65), (.6, 1)), fill=(60, 40, 30))
    elif glyph == "flag":
        draw.rectangle(at((.05, 0), (.15, 1)), fill=(60, 60, 60))
        draw.rectangle(at((.15, .02), (1, .55)), fill=colour)
        draw.rectangle(at((.15, .22), (1, .35)), fill=(255, 255, 255))
    elif glyph == "car":
        draw.polygon(at((0, .75), (0, .5), (.25, .45), (.35, .2), (.75, .2), (1, .5), (1, .75)),
                     fill=colour)
        for left in (.12, .62):
            draw.ellipse(at((left, .6), (left + .26, .95)), fill=(30, 30, 30))
    elif glyph == "blade":
        draw.polygon(at((.9, 0), (1, .1), (.4, .75), (.25, .6)), fill=(150, 150, 160))
        draw.line(at((.15, .5), (.5, .85)), fill=colour, width=3)
        draw.line(at((.3, .7), (.05, .95)), fill=colour, width=4)
    else:
        draw.rectangle(at((.42, .6), (.58, 1)), fill=(110, 75, 40))
        draw.ellipse(at((.1, 0), (.9, .68)), fill=colour)


def draw_scene(things: list[tuple[str, str]], rng: random.Random) -> tuple[Image.Image, list]:
    """Draws up to four (glyph, colour name) things; returns the picture and their pixel boxes."""
    image = Image.new("RGB", (SIDE, SIDE), rng.choice(PAPER))
    draw = ImageDraw.Draw(image)
    for _ in range(2):  # faint strokes behind everything
        ends = [rng.randrange(SIDE) for _ in range(4)]
        draw.line(ends, fill=tuple(rng.randrange(170, 225) for _ in range(3)), width=2)
    boxes, half = [], SIDE // 2
    for cell, (glyph, colour) in zip(rng.sample(range(4), len(things)), things):
        w, h = rng.randrange(20, 29), rng.randrange(22, 30)
        x = cell % 2 * half + rng.randrange(1, half - w)
        y = cell // 2 * half + rng.randrange(1, half - h)
        shade = tuple(max(0, min(255, c + rng.randrange(-25, 26))) for c in COLOURS[colour])
        draw_glyph(draw, glyph, (x, y, x + w - 1, y + h - 1), shade)
        boxes.append([x, y, x + w, y + h])
    return image, boxes


# ------------------------------------------------------------------ the world

class Names:
    """Made-up names of one or two words; no word is shared between splits."""

    def __init__(self, split: str, rng: random.Random) -> None:
        self.split, self.rng = split, rng

    def word(self) -> str:
        """A capitalised word of two or three syllables that belongs to this split."""
        while True:
            syllables = [self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou")
                         for _ in range(self.rng.choice((2, 2, 2, 3)))]
            word = "".join(syllables).capitalize() + self.rng.choice(("", "", "n", "r"))
            slot = zlib.crc32(word.encode()) % 10
            if self.split == ("dev" if slot == 0 else "test" if slot < 3 else "train"):
                return word

    def name(self) -> list[str]:
        """One word, or two in a quarter of the cases."""
        return [self.word() for _ in range(self.rng.choice((1, 1, 1, 2)))]


class Writer:
    """Makes the records of one dataset's split: texts, pictures, gold."""

    def __init__(self, folder: Path, split: str, unit: str, seed: int, hard: Difficulty) -> None:
        self.folder, self.split, self.unit, self.hard = folder, split, unit, hard
        self.rng = random.Random(f"{seed}/{unit}/{split}")
        self.names = Names(split, self.rng)
        self.tokens: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def say(self, phrase: str) -> list[list[int]]:
        """Appends a phrase, each {} a new name; returns the names' token spans."""
        spans = []
        for word in phrase.split():
            start = len(self.tokens)
            self.tokens += self.names.name() if word == "{}" else [word]
            spans += [[start, len(self.tokens)]] if word == "{}" else []
        return spans

    def things(self, glyphs: list[str], colour: str | None = None) -> list[tuple[str, str]]:
        """Glyphs with the given colour, or each with a random one."""
        return [(glyph, colour or self.rng.choice(list(COLOURS))) for glyph in glyphs]

    def picture(self, number: int, things: list[tuple[str, str]]) -> dict:
        """Adds clutter, shuffles (an index says nothing), draws and saves; image fields."""
        room = MAX_OBJECTS - len(things)
        clutter = [g for g in ("tree", "tree")[:room] if self.chance(self.hard.clutter)]
        things = things + self.things(clutter)
        self.rng.shuffle(things)
        image, boxes = draw_scene(things, self.rng)
        name = f"{self.split}_{number:05d}.png"
        image.save(self.folder / "images" / name)
        self.drawn = list(zip(things, boxes))
        return {"image": name, "size": [SIDE, SIDE], "objects": boxes}

    def base(self, number: int, task: str, fields: dict) -> dict:
        name = self.folder.name
        return {"id": f"{name}/{self.split}/{number}", "dataset": name, "task": task,
                "tokens": self.tokens, **fields}

    def mner(self, number: int) -> list[dict]:
        """One mention that the picture types, up to two that the text types; or none at all."""
        rng, gold, shown = self.rng, [], None
        types = list(MEANING["mner"].values())
        plan = []
        if not self.chance(self.hard.empty):
            vague = self.chance(self.hard.ambiguous)
            plan = ["vague"] * vague + rng.choices(types, (3, 3, 2, 2), k=rng.choice((0, 1, 2)))
            plan = plan or [rng.choice(types)]
        rng.shuffle(plan)
        for kind in plan or ["idle"]:
            self.tokens += ["and"] if self.tokens else []  # keeps neighbouring names apart
            if kind == "idle":
                self.say(rng.choice(IDLE))
                continue
            span, = self.say(rng.choice(VAGUE if kind == "vague" else CLEAR[kind]))
            if kind == "vague":
                shown = kind = rng.choices(types, (3, 3, 2, 2))[0]
            label = "miscellaneous" if kind == "other" and self.unit != "T15" else kind
            gold.append({"type": label, "start": span[0], "end": span[1]})
        glyph = {v: k for k, v in MEANING["mner"].items()}.get(shown) or rng.choice(GLYPHS)
        blank = shown and self.chance(self.hard.blank)
        fields = self.picture(number, [] if blank else self.things([glyph]))
        return [self.base(number, "mner", {**fields, "entities": gold})]

    def mre(self, number: int) -> list[dict]:
        """A pair whose relation the text or the picture gives, or which has none."""
        rng = self.rng
        relation = rng.choice([label for label in V_LABELS[self.unit] if label != "none"])
        none, vague = self.chance(2.5 * self.hard.empty), self.chance(self.hard.ambiguous)
        spans = self.say(rng.choice(PAIR_VAGUE if vague else PAIR_CLEAR[relation]))
        if self.chance(.3) or (none and not vague):
            spans += self.say(rng.choice(THIRD))
        pair = spans[:2]
        if none and not vague:  # the text's relation is another pair's
            pair = [spans[0], spans[2]]
        figures = {"couple": "red", "peer": "blue" if self.unit == "V1" else None}
        if vague and none:
            shown = self.things(rng.choice((["car"], ["figure"], ["car", "figure"])), "green")
        elif vague and self.chance(self.hard.blank):
            shown = []
        elif vague and relation in figures:
            shown = self.things(["figure", "figure"], figures[relation])
        elif vague:
            glyph, = (g for g, label in MEANING["mre"].items() if label == relation)
            shown = self.things(["figure", glyph])
        else:
            shown = self.things(rng.sample(GLYPHS, 2))
        gold = {"head": pair[0], "tail": pair[1], "relation": "none" if none else relation}
        return [self.base(number, "mre", {**self.picture(number, shown), **gold})]

    def mee(self, number: int) -> list[dict]:
        """A pair of text and picture with one event or none, as a med and a meae record."""
        rng = self.rng
        kind = rng.choice(list(ROLES))
        none, vague = self.chance(self.hard.empty), self.chance(self.hard.ambiguous)
        cue = next(glyph for glyph, event in MEANING["mee"].items() if event == kind)
        blank = none or self.chance(self.hard.blank if vague else .5)
        shown = [] if blank else self.things([cue])
        for _ in range(rng.choice((0, 1, 2))):
            shown += self.things(["figure"])
        seen = not none and vague and not blank and self.chance(.2)  # only the picture tells it
        if none or seen:
            spans, trigger = self.say(rng.choice(PAIR_VAGUE)), None
        else:
            verb = rng.choice(VAGUE_TRIGGERS if vague else TRIGGERS[kind])
            spans = self.say(f"{{}} {verb} {{}}")
            trigger = [spans[0][1], spans[0][1] + 1]
        if self.chance(.3):
            self.say("today")
        fields = self.picture(number, shown)
        arguments = [{"role": role, "span": span} for role, span in zip(ROLES[kind], spans)
                     if trigger]
        for k, (thing, box) in enumerate(self.drawn, start=1):
            role = object_role(kind, *thing)
            arguments += [{"role": role, "box": box, "object": k}] if role else []
        events = [] if none else [{"type": kind, "trigger": trigger, "arguments": arguments}]
        records = []
        for task in ("med", "meae"):
            record = self.base(number, task, {**fields, "events": events})
            records.append({**record, "id": f"{record['id']}/{task}"})
        return records

    def write(self, task: str, count: int) -> int:
        """Writes SPLIT.jsonl with count texts; returns the number of records."""
        make: Callable[[int], list[dict]] = getattr(self, task)
        lines = []
        for number in range(count):
            self.tokens = []
            lines += [json.dumps(record) for record in make(number)]
        path = self.folder / f"{self.split}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return len(lines)


def object_role(event: str, glyph: str, colour: str) -> str | None:
    """The role a drawn thing plays in an event: colour counts in an attack, and nowhere else."""
    first, second = ROLES[event]
    if glyph == "figure":
        return {"red": first, "blue": second}.get(colour) if event == "attack" else first
    return second if (event, glyph) in (("meet", "house"), ("transport", "car")) else None


def describe(name: str, unit: str) -> dict:
    """dataset.json of one of the demo's datasets."""
    types = sorted("miscellaneous" if t == "other" and unit != "T15" else t
                   for t in MEANING["mner"].values())
    if unit == "MEE":
        roles = {event: sorted(roles) for event, roles in sorted(ROLES.items())}
        units, labels = {"med": "MED", "meae": "MEAE"}, {"med": sorted(ROLES), "meae": roles}
    elif unit in V_LABELS:
        units, labels = {"mre": unit}, {"mre": sorted(V_LABELS[unit])}
    else:
        units, labels = {"mner": unit}, {"mner": types}
    return {"name": name, "units": units, "labels": labels, "note": "made by demo.py"}


def make_world(dst: str | Path, seed: int = 0, scale: float = 1.0,
               hard: Difficulty = Difficulty()) -> dict[str, dict[str, int]]:
    """Writes the demo corpus below dst; returns {dataset: {split: records}}.

    The same arguments give the same bytes. scale shrinks every split (tests use it).
    """
    counts: dict[str, dict[str, int]] = {}
    for unit, size in SIZES.items():
        name = f"demo_{unit.lower()}"
        folder = Path(dst) / name
        (folder / "images").mkdir(parents=True, exist_ok=True)
        text = json.dumps(describe(name, unit), indent=1) + "\n"
        (folder / "dataset.json").write_text(text, encoding="utf-8")
        task = "mee" if unit == "MEE" else "mre" if unit in V_LABELS else "mner"
        counts[name] = {
            split: Writer(folder, split, unit, seed, hard).write(
                task, max(2, round((fixed or size) * scale)))
            for split, fixed in SPLITS.items()}
    return counts


# ------------------------------------------------------------------ generic lessons

EOS = 1

class Lessons:
    """Endless generic text-to-text examples over the words of some texts and made-up words.

    No lesson knows a task or a label: the keys to look for are random words, listed in the input.
    """

    def __init__(self, texts: list[str], avoid: set[str], tokenizer: Tokenizer,
                 rng: random.Random) -> None:
        self.texts, self.tokenizer, self.rng = texts, tokenizer, rng
        words = Counter(word for text in texts for word in text.split())
        plain = sorted(w for w in words if w.isalpha() and w not in avoid)
        self.lower = [w for w in plain if w.islower() and words[w] > 1] or ["word"]
        self.parts = sorted({part for w in plain if w.istitle() for part in (w[:2], w[2:4], w[-3:])
                             if part}) or ["ka", "to"]
        self.avoid = avoid
        self.level = 0.0  # 0 .. 1, how far training is: lessons start short
        self.kinds = (self.copy, self.span, self.capitals, self.pairs, self.pairs, self.coded,
                      self.triple, self.nested, self.index, self.corrupt)

    def made_up(self) -> str:
        """A lower-case word of random parts."""
        parts = self.rng.choices(self.parts, k=self.rng.choice((1, 2, 2, 3)))
        return "".join(parts).lower()

    def word(self) -> str:
        """A lower-case word, known or made up, never one of the words to avoid."""
        word = self.rng.choice(self.lower) if self.rng.random() < .7 else self.made_up()
        return word if word not in self.avoid else "word"

    def words(self, most: int, least: int = 0) -> list[str]:
        """Distinct words, at most `most`, fewer while training is young."""
        most = max(least, 1, round(most * (.4 + .6 * self.level)))
        wanted, found = self.rng.randint(least, most), []
        while len(found) < wanted:
            word = self.word()
            found += [word] if word not in found else []
        return found

    def name(self) -> str:
        """One or two capitalised made-up words."""
        return " ".join(self.made_up().capitalize() for _ in range(self.rng.choice((1, 1, 2))))

    def copy(self) -> tuple[str, str]:
        text = " ".join(self.name() if self.rng.random() < .5 else self.word()
                        for _ in range(self.rng.randint(1, 3 + round(5 * self.level))))
        return f"Copy. Text: {text}", text

    def span(self) -> tuple[str, str]:
        """What stands between two given words."""
        first, second, *rest = self.words(8, 4)
        inner, outer = [*rest[:2], self.name()], rest[2:]
        self.rng.shuffle(inner)
        text = " ".join([*outer, first, *inner, second, *self.words(2)])
        return f"Copy between {first} and {second}. Text: {text}", " ".join(inner)

    def capitals(self) -> tuple[str, str]:
        """All capitalised runs in order."""
        names = [self.name() for _ in range(self.rng.randint(0, 3))]
        text = " ".join([*self.words(2)] + [f"{n} {' '.join(self.words(3, 1))}" for n in names])
        return f"Please extract the names. Text: {text}", " <spot> ".join(names) or "none"

    def pairs(self) -> tuple[str, str]:
        """Each listed key that stands beside a name, with that name."""
        keys = self.words(5, 2)
        shown = [self.rng.choice(keys) for _ in range(self.rng.choice((0, 1, 2, 2, 3)))]
        text, answer = [" ".join(self.words(2))], []
        for key in shown:
            name, other = self.name(), " ".join(w for w in self.words(2) if w not in keys)
            text.append(self.rng.choice((f"{other} {key} {name}", f"{name} {key} {other}")))
            answer.append(f"{key}, {name}")
        kind = " ".join(self.words(2, 1))
        prompt = f"Please extract the following {kind}: {', '.join(sorted(keys))}. Text: "
        return prompt + " and ".join(text), " <spot> ".join(answer) or "none"

    def coded(self) -> tuple[str, str]:
        """As pairs, but the input tells which word in the text stands for which key."""
        words = self.words(8, 4)
        keys = dict(zip(words[::2], words[1::2]))
        text, answer = [], []
        for sign in self.rng.sample(sorted(keys), self.rng.randint(1, len(keys))):
            name = self.name()
            text.append(self.rng.choice((f"{sign} {name}", f"{name} {sign}")))
            answer.append(f"{keys[sign]}, {name}")
        code = ", ".join(f"{sign} {key}" for sign, key in keys.items())
        return f"Please extract by code: {code}. Text: {' and '.join(text)}", " <spot> ".join(answer)

    def triple(self) -> tuple[str, str]:
        """The listed word that is in the text, between two given names."""
        head, tail, keys = self.name(), self.name(), self.words(5, 2)
        found = self.rng.choice(keys)
        middle = [w for w in self.words(3) if w not in keys] + [found]
        self.rng.shuffle(middle)
        ends = [head, tail]
        self.rng.shuffle(ends)
        prompt = f"Please extract the following word between {head} and {tail}: "
        text = f"{', '.join(sorted(keys))}. Text: {ends[0]} {' '.join(middle)} {ends[1]}"
        return prompt + text, f"{head} <spot> {found} <spot> {tail}"

    def nested(self) -> tuple[str, str]:
        """Groups of listed keys: the group that is named, its keys, their names."""
        words = self.words(9, 6)
        groups = {words[k]: sorted(words[k + 1:k + 3]) for k in range(0, len(words) - 2, 3)}
        chosen = self.rng.choice(sorted(groups))
        text, answer = [chosen], [chosen]
        for key in self.rng.choices(groups[chosen], k=self.rng.randint(0, 3)):
            name = self.rng.choice((self.name(), f"O{self.rng.randint(1, 4)}"))
            text.append(f"{key} {name}")
            answer.append(f"{key}, {name}")
        listed = "; ".join(f"{group}: {', '.join(keys)}" for group, keys in sorted(groups.items()))
        return (f"Please extract the following groups: {listed}. Text: {' and '.join(text)}",
                " <spot> ".join(answer))

    def index(self) -> tuple[str, str]:
        """The places (O1, O2, ...) of given words in a list."""
        words = self.words(4, 1)
        asked = self.rng.sample(range(len(words)), self.rng.randint(1, min(3, len(words))))
        prompt = f"Please extract the places of {', '.join(words[k] for k in asked)}. Text: "
        return prompt + " ".join(words), " <spot> ".join(f"{words[k]}, O{k + 1}" for k in asked)

    def corrupt(self) -> tuple[str, str]:
        """Span corruption: 15 % of the words, in spans of about two, become sentinels."""
        words = self.rng.choice(self.texts).split()
        source, target, k, count = [], [], 0, 0
        while k < len(words):
            if self.rng.random() < .08 and count < 10:
                length = self.rng.choice((1, 2, 3))
                source.append(f"<extra_id_{count}>")
                target += [f"<extra_id_{count}>", *words[k:k + length]]
                k, count = k + length, count + 1
            else:
                source.append(words[k])
                k += 1
        return " ".join(source), " ".join(target + [f"<extra_id_{count}>"])

    def ids(self, text: str) -> Tensor:
        """Token ids of a text, in which <extra_id_k> are the sentinels."""
        parts, ids = re.split(r"<extra_id_(\d+)>", text), []
        for k, part in enumerate(parts):
            if k % 2:
                ids.append(self.tokenizer.spot_id - int(part))  # <spot> is sentinel 0
            elif part.strip():
                ids += self.tokenizer.encode(part.strip())[:-1]
        return torch.tensor([*ids, EOS])

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """input ids [B,S] padded with 0 and labels [B,T] padded with -100."""
        rows = [self.rng.choice(self.kinds)() for _ in range(size)]
        sources = [self.ids(source) for source, _ in rows]
        targets = [self.ids(target) for _, target in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(sources, True, 0), pad(targets, True, -100)


# ------------------------------------------------------------------ the tiny backbone

@dataclass(frozen=True)
class Tiny:
    """How the tiny T5 and ViT are made."""

    pieces: int = 500  # of the tokenizer
    width: int = 128
    layers: int = 3  # in the encoder and in the decoder
    heads: int = 4
    inner: int = 256  # width of the feed-forward
    steps: int = 2500
    batch: int = 32
    rate: float = 2e-3
    vit_width: int = 64
    vit_steps: int = 600
    vit_batch: int = 64
    vit_rate: float = 1e-3


def make_tokenizer(texts: list[str], path: Path, pieces: int) -> None:
    """Trains a sentencepiece unigram model with T5's special ids: pad 0, eos 1, unk 2, no bos."""
    # The trainer proposes a piece only if it occurs in two different words: hence the commas.
    counts = Counter(word.strip(".,:;") for text in texts for word in text.split())
    common = [word for word, count in counts.items() if word.isalpha() and count >= 20]
    common += ["none"] + [f"O{k}" for k in range(10)]
    extra = [f"{word} {word}, {word}." for word in common]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + extra * 20), model_writer=out,
        vocab_size=pieces, model_type="unigram", character_coverage=1.0, pad_id=0, eos_id=EOS,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a short rise, then a half cosine to zero."""
    rise = max(1, min(100, steps // 10))
    return min(1.0, (step + 1) / rise) * (.5 + .5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def start_mimetic(model: T5) -> None:
    """Mimetic initialisation (Trockman and Kolter, arXiv 2305.09828): start where training leads.

    Queries equal keys, so that like attends to like; values and outputs make a near identity, so
    that what is attended to is copied; and some heads prefer neighbours. From T5's own random start
    copying needs thousands of steps to appear, from here about a hundred.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            width = module.k.weight.shape[0]
            turn = torch.nn.init.orthogonal_(torch.empty(module.k.weight.shape))
            module.k.weight.copy_(turn)
            module.q.weight.copy_(turn * (width // module.heads) ** -.5)
            turn = torch.nn.init.orthogonal_(torch.empty(module.v.weight.shape))
            module.v.weight.copy_(turn)
            module.o.weight.copy_(turn.T)
    after = model.config.relative_attention_num_buckets // 2  # buckets of keys to the right
    for head, bucket in enumerate((1, after + 1, 2)):
        model.encoder.relative_bias.weight[bucket, head] += 7.0
    for head, bucket in enumerate((1, 2)):
        model.decoder.relative_bias.weight[bucket, head] += 7.0


def make_t5(lessons: Lessons, tiny: Tiny, seed: int) -> T5:
    """A tiny T5 with v1.1's feed-forward and a tied head, trained on the lessons."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=lessons.tokenizer.vocab_size + 100, d_model=tiny.width, num_heads=tiny.heads,
        d_kv=tiny.width // tiny.heads, d_ff=tiny.inner, num_layers=tiny.layers,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_head=True, scale_logits=True)
    model = T5(config).train()
    start_mimetic(model)
    optimizer = torch.optim.Adam(model.parameters(), tiny.rate, betas=(.9, .98), fused=True)
    mean = None
    with tqdm(range(tiny.steps), desc="tiny T5", unit="step") as bar:
        for step in bar:
            lessons.level = min(1.0, 1.5 * step / tiny.steps)
            for group in optimizer.param_groups:
                group["lr"] = tiny.rate * schedule(step, tiny.steps)
            inputs, labels = lessons.batch(tiny.batch)
            _, loss = model(inputs, inputs != 0, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mean = loss.item() if mean is None else .98 * mean + .02 * loss.item()
            bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
    return model.eval()


def make_vit(tiny: Tiny, seed: int) -> ViT:
    """A tiny ViT, trained to tell which drawings in which colours are in a picture or a crop."""
    rng = random.Random(f"{seed}/vit")
    torch.manual_seed(seed)
    model = ViT(ViTConfig(hidden_size=tiny.vit_width, num_hidden_layers=3, num_attention_heads=4,
                          intermediate_size=2 * tiny.vit_width, image_size=32, patch_size=8))
    kinds = [(glyph, colour) for glyph in GLYPHS for colour in COLOURS]
    head = torch.nn.Linear(tiny.vit_width, len(kinds))
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(weights, tiny.vit_rate, fused=True)
    mean = None
    with tqdm(range(tiny.vit_steps), desc="tiny ViT", unit="step") as bar:
        for step in bar:
            pixels, truth = [], []
            while len(pixels) < tiny.vit_batch:
                things = [rng.choice(kinds) for _ in range(rng.randint(0, MAX_OBJECTS))]
                image, boxes = draw_scene(things, rng)
                views = (image, *(crop(image, box) for box in boxes))
                pixels += [preprocess(view, size=model.size) for view in views]
                shown = [things, *([thing] for thing in things)]
                truth += [[float(kind in seen) for kind in kinds] for seen in shown]
            logits = head(model(torch.stack(pixels))[:, 0])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(truth))
            mean = loss.item() if mean is None else .98 * mean + .02 * loss.item()
            bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
            for group in optimizer.param_groups:
                group["lr"] = tiny.vit_rate * schedule(step, tiny.vit_steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def make_backbone(dst: str | Path, texts: list[str], seed: int = 0, tiny: Tiny = Tiny(),
                  avoid: Iterable[str] = ()) -> None:
    """Makes dst/t5 (with spiece.model) and dst/vit in the HF layout from training inputs `texts`.

    avoid: words never to be used as keys of the lessons, meant for the corpus' labels.
    """
    dst = Path(dst)
    make_tokenizer(texts, dst / "t5" / "spiece.model", tiny.pieces)
    lessons = Lessons(texts, set(avoid), Tokenizer(dst / "t5"), random.Random(f"{seed}/lessons"))
    make_t5(lessons, tiny, seed).save_pretrained(dst / "t5")
    make_vit(tiny, seed).save_pretrained(dst / "vit")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo world's corpus.")
    parser.add_argument("dst", help="folder to write the corpus into")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    arguments = parser.parse_args()
    for name, splits in make_world(arguments.dst, arguments.seed).items():
        print(f"{arguments.dst}/{name}: " + ", ".join(f"{n} {s}" for s, n in splits.items()))


if __name__ == "__main__":
    main()
