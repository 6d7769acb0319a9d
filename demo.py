"""The demo: a small drawn world for all seven units, and the making of a tiny T5 and a tiny ViT.

    python demo.py DST [--seed 0]                   writes the world's corpus into DST
    python demo.py DST --scale .6 --conflict full   ... another world, for a study (tools/paper.py)
    python demo.py [DST] --backbone DIR             makes a tiny T5 and a tiny ViT for it in DIR

The world is a corpus as engine/schema.py has it: short texts on made-up names, each with a picture.
  - The picture is needed: many mentions, pairs and triggers read the same whatever they are, and
    only what is drawn decides the type, the relation, the event, and which box has which role.
  - The tasks share names, words and symbols, and disagree about their meaning.
  - The units differ in size; the names of each split are new, so that names must be copied.
The tiny backbone is made as its big sisters were: T5 by span corruption (arXiv 1910.10683) and
text-to-text instructions on random words (as flan-t5, arXiv 2210.11416), ViT (arXiv 2010.11929) by
classifying drawings. Neither is taught a label of any task.  demo_backbone/ holds one that was made
so, which the demo uses; its manifest.json tells how.

Letters: B batch, S source tokens, T target tokens.
"""

import json
import math
import platform
import random
import re
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data import Tokenizer, prompt
from engine.command import Bar, Parser
from engine.corpus import load_corpus, load_datasets
from engine.files import file_hash
from engine.weights import SHIPPED
from t5 import T5, Attention, T5Config
from vision import ViT, ViTConfig

# What makes the world hard, as probabilities.
AMBIGUOUS = 0.8  # a text holds something that only the picture decides
BLANK = 0.08  # ... and the picture lacks it: an error that nobody can avoid
CLUTTER = 0.5  # a meaningless thing is drawn beside the others
EMPTY = 0.1  # a text without entity, relation or event

# p_m of Eq. (9), measured: best dev F1 of a plain LoRA trained on one unit alone for 250 steps,
# `train.py --method lora --units U --steps 250 --epochs 99 --lr-epochs 99`, seed 0.
P_M = {"T15": 92.3, "T17": 89.9, "SNAP": 90.2, "V1": 96.5, "V2": 85.4, "MED": 90.0, "MEAE": 69.2}

SIZES = {"T15": 1500, "T17": 400, "SNAP": 1000, "V1": 600, "V2": 1500, "MEE": 1200}  # train texts
SPLITS = {"train": None, "dev": 60, "test": 300}  # texts of every unit; of train as in SIZES
# Datasets by their training texts in the paper's Table 1: 20,875, 12,247, 7,824, ..., 2,848.
TABLE_1 = ("MEE", "V2", "V1", "T15", "SNAP", "T17")
COLOURS = {"red": (214, 40, 40), "blue": (40, 80, 214), "green": (40, 160, 70),
           "yellow": (236, 190, 30)}
PAPER = ((250, 250, 245), (225, 235, 245), (240, 228, 220), (228, 240, 226))
SIDE, MAX_OBJECTS = 64, 4

# One drawing, three meanings: the tasks read the same symbols differently, on purpose.
TYPES = {"person": "figure", "location": "house", "organization": "flag", "other": "car"}
MET = {"member of": "flag", "residence": "house"}  # drawn beside a figure; else a second figure
CUES = {"attack": "blade", "demonstrate": "flag", "meet": "house", "transport": "car"}
ROLES = {"attack": ("attacker", "target"), "demonstrate": ("demonstrator", "place"),
         "meet": ("participant", "place"), "transport": ("passenger", "vehicle")}
RELATIONS = {"V1": ("couple", "member of", "none", "peer"),
             "V2": ("member of", "none", "peer", "residence")}

# How far the tasks contradict each other: by which words MRE and MEE call what is drawn. MNER calls
# a flag "organization", a house "location" and a car "other" in any world.
AGREE = {"member of": "organization", "residence": "location", "demonstrate": "organization",
         "meet": "location", "transport": "other"}
TURN = {"demonstrate": "other", "meet": "organization", "transport": "location"}
CONFLICTS = {
    "agree": AGREE,  # one word for a thing in all tasks
    "apart": {},  # every task has words of its own, as real label lists have but for "none"
    "half": AGREE | TURN,  # MEE means other things by MNER's words
    "full": AGREE | TURN | {"member of": "location", "residence": "other"}}  # and MRE others again

PHRASES = {
    "vague": ("so proud of {}", "look at {}", "{} looks great", "waiting for {}", "love {} today"),
    "person": ("says coach {}", "singer {} smiled", "{} joined us"),
    "location": ("downtown {} is busy", "rain near {}", "we drove to {}"),
    "organization": ("club {} won", "{} hired staff", "shares of {} fell"),
    "other": ("film {} opens", "the {} award", "reading {} now"),
    "idle": ("good morning everyone", "what a busy day", "rain again today", "we won today",
             "so tired of waiting", "nothing to see here")}
PAIR_VAGUE = ("{} with {} today", "{} and {} again", "great day for {} and {}")
PAIR_CLEAR = {"couple": ("{} married {}", "{} loves {}"), "peer": ("{} met {}", "{} faced {}"),
              "member of": ("{} joined {}", "{} signed for {}"),
              "residence": ("{} moved to {}", "{} lives in {}")}
THIRD = ("says", "near", "thanks")
TRIGGERS = {"attack": ("struck", "bombed"), "demonstrate": ("protested", "marched"),
            "meet": ("met", "hosted"), "transport": ("drove", "boarded")}
VAGUE_TRIGGERS = ("joined", "faced", "moved", "took")

# Each glyph: (shape, colour or None for the thing's own, points in its box scaled to 0..1). A tree
# never means anything.
INK, WOOD, STEEL, WHITE = (40, 40, 40), (100, 65, 45), (150, 150, 160), (255, 255, 255)
GLYPHS = {
    "figure": (("ellipse", None, (.3, 0, .7, .35)),
               ("polygon", None, (.5, .3, .9, .7, .65, .65, .75, 1, .25, 1, .35, .65, .1, .7))),
    "house": (("polygon", WOOD, (0, .45, .5, 0, 1, .45)), ("rectangle", None, (.1, .45, .9, 1)),
              ("rectangle", INK, (.4, .65, .6, 1))),
    "flag": (("rectangle", INK, (.05, 0, .15, 1)), ("rectangle", None, (.15, .02, 1, .55)),
             ("rectangle", WHITE, (.15, .22, 1, .35))),
    "car": (("polygon", None, (0, .75, 0, .5, .25, .45, .35, .2, .75, .2, 1, .5, 1, .75)),
            ("ellipse", INK, (.12, .6, .38, .95)), ("ellipse", INK, (.62, .6, .88, .95))),
    "blade": (("polygon", STEEL, (.9, 0, 1, .1, .4, .75, .25, .6)),
              ("polygon", None, (.15, .5, .5, .85, .4, .95, .05, .6)),
              ("polygon", None, (.3, .7, .1, 1, 0, .9, .2, .6))),
    "tree": (("rectangle", WOOD, (.42, .6, .58, 1)), ("ellipse", None, (.1, 0, .9, .68)))}


def draw_scene(things: list[tuple[str, str]], rng: random.Random) -> tuple[Image.Image, list]:
    """Draw up to four (glyph, colour name) things; returns the picture and their pixel boxes."""
    image = Image.new("RGB", (SIDE, SIDE), rng.choice(PAPER))
    draw = ImageDraw.Draw(image)
    for _ in range(2):  # faint strokes behind everything
        draw.line([rng.randrange(SIDE) for _ in range(4)],
                  fill=tuple(rng.randrange(170, 225) for _ in range(3)), width=2)
    boxes, half = [], SIDE // 2
    for cell, (glyph, colour) in zip(rng.sample(range(4), len(things)), things):
        w, h = rng.randrange(20, 29), rng.randrange(22, 30)
        x = cell % 2 * half + rng.randrange(1, half - w)
        y = cell // 2 * half + rng.randrange(1, half - h)
        shade = tuple(max(0, min(255, c + rng.randrange(-25, 26))) for c in COLOURS[colour])
        for shape, fill, points in GLYPHS[glyph]:
            xy = [(x + px * (w - 1), y + py * (h - 1)) for px, py in zip(points[::2], points[1::2])]
            getattr(draw, shape)(xy, fill=fill or shade)
        boxes.append([x, y, x + w, y + h])
    return image, boxes


class Writer:
    """Writes the records of one split of a dataset: texts, pictures, gold."""

    def __init__(self, folder: Path, split: str, unit: str, seed: int, conflict: str) -> None:
        self.folder, self.split, self.unit = folder, split, unit
        self.called = CONFLICTS[conflict]  # what this world calls a relation or an event
        self.rng = random.Random(f"{seed}/{unit}/{split}")
        self.number, self.tokens = 0, []  # of the text that is being written

    def word(self, most: int) -> str:
        """A made-up name of two syllables, or up to `most`; no two splits share a name."""
        syllables = [self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou")
                     for _ in range(self.rng.choice((2, 2, 2, most)))]
        word = "".join(syllables).capitalize() + self.rng.choice(("", "", "n", "r"))
        slot = zlib.crc32(word.encode()) % 10
        fits = self.split == ("dev" if slot == 0 else "test" if slot < 3 else "train")
        return word if fits else self.word(most)

    def chance(self, probability: float) -> bool:
        """True as often as the probability says."""
        return self.rng.random() < probability

    def say(self, phrase: str) -> list[list[int]]:
        """Append a phrase with new names for {}, at most one of two words; returns their spans."""
        spans = []
        for word in phrase.split():
            start = len(self.tokens)
            if word != "{}":
                self.tokens.append(word)
                continue
            double = self.chance(.35) and all(b - a == 1 for a, b in spans)
            self.tokens += [self.word(2), self.word(2)] if double else [self.word(3)]
            spans.append([start, len(self.tokens)])
        return spans

    def things(self, glyphs: list[str], colour: str | None = None) -> list[tuple[str, str]]:
        """Glyphs in the given colour or in random ones, and clutter, in random order."""
        things = [(glyph, colour or self.rng.choice(list(COLOURS))) for glyph in glyphs]
        things += [("tree", self.rng.choice(list(COLOURS)))
                   for _ in range(min(2, MAX_OBJECTS - len(glyphs))) if self.chance(CLUTTER)]
        self.rng.shuffle(things)
        return things

    def record(self, task: str, things: list[tuple[str, str]]) -> dict:
        """Draw the things, save the picture and return a record without gold."""
        image, boxes = draw_scene(things, self.rng)
        name, dataset = f"{self.split}_{self.number:05d}.png", self.folder.name
        image.save(self.folder / "images" / name)
        return {"id": f"{dataset}/{self.split}/{self.number}", "dataset": dataset, "task": task,
                "tokens": self.tokens, "image": name, "size": [SIDE, SIDE], "objects": boxes}

    def mner(self) -> list[dict]:
        """One mention that the picture types, up to two that the text types; or none at all."""
        rng, gold, plan = self.rng, [], []
        glyph = rng.choice(list(GLYPHS))  # says nothing where nothing is vague
        if not self.chance(EMPTY):
            plan = rng.choices(list(TYPES), (3, 3, 2, 2), k=rng.choice((0, 1, 2)))
            plan += ["vague"] if self.chance(AMBIGUOUS) or not plan else []
            rng.shuffle(plan)
        for label in plan or ["idle"]:
            self.tokens += ["and"] if self.tokens else []  # keeps neighbouring names apart
            for start, end in self.say(rng.choice(PHRASES[label])):
                if label == "vague":
                    label = rng.choices(list(TYPES), (3, 3, 2, 2))[0]
                    glyph = None if self.chance(BLANK) else TYPES[label]
                gold.append({"type": label, "start": start, "end": end})
        return [self.record("mner", self.things([glyph] if glyph else [])) | {"entities": gold}]

    def mre(self) -> list[dict]:
        """A pair whose relation the text or the picture gives, or which has none."""
        rng = self.rng
        relation = rng.choice([label for label in RELATIONS[self.unit] if label != "none"])
        none, vague = self.chance(2.5 * EMPTY), self.chance(AMBIGUOUS)
        spans = self.say(rng.choice(PAIR_VAGUE if vague else PAIR_CLEAR[relation]))
        other = none and not vague  # then the text's relation is another pair's
        if other or self.chance(.3):
            self.tokens += [rng.choice(THIRD), self.word(2)]
            spans.append([len(self.tokens) - 1, len(self.tokens)])
        if not vague:
            shown = self.things(rng.sample(list(GLYPHS), 2))
        elif none:
            shown = self.things(rng.choice((["car"], ["figure"], ["car", "figure"])), "green")
        else:
            glyphs = [] if self.chance(BLANK) else ["figure", MET.get(relation, "figure")]
            shown = self.things(glyphs, "red" if relation == "couple" else
                                "blue" if relation == "peer" and self.unit == "V1" else None)
        return [self.record("mre", shown) | {"head": spans[0], "tail": spans[2 if other else 1],
                                             "relation": "none" if none else
                                             self.called.get(relation, relation)}]

    def mee(self) -> list[dict]:
        """A pair of text and picture with one event or none, as a med and a meae record."""
        rng = self.rng
        event = rng.choice(list(ROLES))
        none, vague = self.chance(EMPTY), self.chance(AMBIGUOUS)
        blank = none or self.chance(BLANK if vague else .5)
        glyphs = ([] if blank else [CUES[event]]) + ["figure"] * rng.choice((0, 1, 2))
        wordless = not none and vague and not blank and self.chance(.2)  # only the picture tells it
        trigger, arguments = None, []
        if none or wordless:
            self.say(rng.choice(PAIR_VAGUE))
        else:
            verb = rng.choice(VAGUE_TRIGGERS if vague else TRIGGERS[event])
            spans = self.say("{} " + verb + (" {} today" if self.chance(.3) else " {}"))
            trigger = [spans[0][1], spans[0][1] + 1]
            arguments = [{"role": role, "span": span} for role, span in zip(ROLES[event], spans)]
        things = self.things(glyphs)
        record = self.record("mee", things)
        for k, (thing, box) in enumerate(zip(things, record["objects"]), start=1):
            role = object_role(event, *thing)
            arguments += [{"role": role, "box": box, "object": k}] if role else []
        events = [] if none else [{"type": self.called.get(event, event), "trigger": trigger,
                                   "arguments": arguments}]
        return [record | {"id": f"{record['id']}/{task}", "task": task, "events": events}
                for task in ("med", "meae")]

    def write(self, count: int) -> int:
        """Write SPLIT.jsonl with `count` texts; returns the number of records."""
        make = self.mee if self.unit == "MEE" else self.mre if self.unit in RELATIONS else self.mner
        lines = []
        for number in range(count):
            self.number, self.tokens = number, []
            lines += [json.dumps(record) + "\n" for record in make()]
        (self.folder / f"{self.split}.jsonl").write_text("".join(lines), encoding="utf-8")
        return len(lines)


def object_role(event: str, glyph: str, colour: str) -> str | None:
    """The role that a drawn thing plays in an event; colour counts in an attack alone."""
    first, second = ROLES[event]
    if glyph == "figure":
        return {"red": first, "blue": second}.get(colour) if event == "attack" else first
    return second if (event, glyph) in (("meet", "house"), ("transport", "car")) else None


def training_sizes(texts: float = 1.0, imbalance: float | None = None) -> dict[str, float]:
    """Training texts of each dataset: SIZES times `texts`; with `imbalance`, as many texts in all,
    but equal steps in the ratio from each dataset of TABLE_1 to the next, so that the first has
    `imbalance` times as many as the last."""
    if imbalance is None:
        return {unit: size * texts for unit, size in SIZES.items()}
    share = {unit: imbalance ** (-k / (len(TABLE_1) - 1)) for k, unit in enumerate(TABLE_1)}
    whole = texts * sum(SIZES.values()) / sum(share.values())
    return {unit: whole * share[unit] for unit in SIZES}


def make_world(dst: str | Path, seed: int = 0, scale: float = 1.0, texts: float = 1.0, imbalance:
               float | None = None, conflict: str = "apart") -> dict[str, dict[str, int]]:
    """Write the demo corpus below dst; returns {dataset: {split: records}}. The same arguments give
    the same bytes. `scale` is a factor on the size of every split, `texts` one more on that of the
    training splits, `imbalance` the largest of these over the smallest, `conflict` of CONFLICTS."""
    counts, called = {}, CONFLICTS[conflict]
    events = {called.get(event, event): roles for event, roles in ROLES.items()}
    for unit, size in training_sizes(texts, imbalance).items():
        folder = Path(dst) / f"demo_{unit.lower()}"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        labels = ({"med": sorted(events), "meae": events} if unit == "MEE" else
                  {"mre": sorted(called.get(label, label) for label in RELATIONS[unit])}
                  if unit in RELATIONS else {"mner": sorted(TYPES)})
        units = {task: task.upper() if unit == "MEE" else unit for task in labels}
        text = json.dumps({"name": folder.name, "units": units, "labels": labels})
        (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")
        counts[folder.name] = {
            split: Writer(folder, split, unit, seed, conflict).write(
                max(2, round((fixed or size) * scale))) for split, fixed in SPLITS.items()}
    return counts


ASK = {"copy": "Copy", "pairs": "Please extract the following", "nested": "Please extract groups",
       "triple": "Please extract the following word between"}


class Lessons:
    """Endless text-to-text examples, pairs (input, answer), on words of given texts and made-up
    ones. No lesson knows a task or a label: the keys to look for are random words, listed in the
    input."""

    def __init__(self, texts: list[str], avoid: set[str], tokenizer: Tokenizer,
                 rng: random.Random) -> None:
        self.texts, self.tokenizer, self.rng = texts, tokenizer, rng
        self.avoid = {*avoid, "and"}  # "and" separates
        counts = Counter(filter(str.isalpha, " ".join(texts).split()))
        self.lower = [w for w in counts if w.islower() and counts[w] > 1]
        names = [w for w in counts if w.istitle()]
        self.heads = sorted({w[:2] for w in names})
        self.tails = sorted({w[k:k + 2] for w in names for k in (2, 4)})
        self.pool: list[list] = []  # batches made ahead
        self.level = 0.0  # 0 .. 1, how far training is: lessons start short
        # Those that take longest to learn come more often.
        self.lessons = (self.copy, self.triple, self.corrupt, *[self.pairs] * 5, *[self.nested] * 2)

    def made_up(self) -> str:
        """A capitalised word made of syllables of the texts' names."""
        tails = self.rng.choices(self.tails, k=self.rng.choice((1, 1, 2)))
        return self.rng.choice(self.heads) + "".join(tails)

    def word(self) -> str:
        """A lower-case word, known or made up, never one of the words to avoid."""
        known = self.lower and self.rng.random() < .7
        word = self.rng.choice(self.lower) if known else self.made_up().lower()
        return self.word() if word in self.avoid else word

    def words(self, most: int, least: int = 0) -> list[str]:
        """`least` to `most` distinct words, fewer while training is young."""
        most = max(least, 1, round(most * (.4 + .6 * self.level)))
        count, words = self.rng.randint(least, most), {}
        while len(words) < count:
            words[self.word()] = None
        return list(words)

    def name(self) -> str:
        """One or two capitalised made-up words."""
        return " ".join(self.made_up() for _ in range(self.rng.choice((1, 1, 2))))

    def copy(self) -> tuple[str, str]:
        text = " ".join(self.name() if self.rng.random() < .5 else self.word()
                        for _ in range(self.rng.randint(1, 3 + round(5 * self.level))))
        return f"{ASK['copy']}: {text}", text

    def pairs(self) -> tuple[str, str]:
        """Each listed key with the name beside it; or beside the word that is given as its code."""
        words, coded = self.words(8, 4), self.rng.random() < .25
        keys = words[:len(words) // 2]
        signs = words[len(keys):] if coded else keys
        text, answer = [self.word()], []
        for k in self.rng.choices(range(len(keys)), k=self.rng.choice((0, 1, 2, 3, 3))):
            name, around = self.name(), [w for w in self.words(2) if w not in words] + [signs[k]]
            text += ["and", *self.rng.choice(((*around, name), (name, *around[::-1])))]
            answer.append(f"{keys[k]}, {name}")
        listed = [f"{sign} {key}" for sign, key in zip(signs, keys)] if coded else sorted(keys)
        return (f"{ASK['pairs']} {self.word()}: {', '.join(listed)}. Text: {' '.join(text)}",
                " <spot> ".join(answer) or "none")

    def triple(self) -> tuple[str, str]:
        """The listed word that is in the text, between two given names."""
        head, tail, keys = self.name(), self.name(), self.words(5, 2)
        key = self.rng.choice(keys)
        text = [head, key, tail, *(w for w in self.words(3) if w not in keys)]
        self.rng.shuffle(text)
        prompt = f"{ASK['triple']} {head} and {tail}: {', '.join(sorted(keys))}. Text: "
        return prompt + " ".join(text), f"{head} <spot> {key} <spot> {tail}"

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
        return f"{ASK['nested']}: {listed}. Text: {' and '.join(text)}", " <spot> ".join(answer)

    def corrupt(self) -> tuple[str, str]:
        """Span corruption: 15 % of the words, in spans of about two, become sentinels."""
        words, source, target, spans = self.rng.choice(self.texts).split()[:60], [], [], 0
        while words:
            if self.rng.random() < .08:
                source.append(f"<extra_id_{spans}>")
                target += [f"<extra_id_{spans}>", *words[:(length := self.rng.choice((1, 2, 3)))]]
                words, spans = words[length:], spans + 1
            else:
                source.append(words.pop(0))
        return " ".join(source), " ".join(target + [f"<extra_id_{spans}>"])

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """input ids [B,S] padded with 0 and labels [B,T] padded with -100, of similar lengths."""
        if not self.pool:
            rows = [[self.tokenizer.encode(text) for text in self.rng.choice(self.lessons)()]
                    for _ in range(8 * size)]
            rows.sort(key=lambda row: len(row[0]) + len(row[1]))
            self.pool = [rows[k:k + size] for k in range(0, len(rows), size)]
            self.rng.shuffle(self.pool)
        sources, targets = (list(map(torch.tensor, column)) for column in zip(*self.pool.pop()))
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(sources, True, 0), pad(targets, True, -100)


@dataclass(frozen=True)
class Tiny:
    """How the tiny T5 and ViT are made."""
    pieces: int = 600  # of the tokenizer
    width: int = 128
    layers: int = 3  # in the encoder and in the decoder
    heads: int = 8
    inner: int = 256  # width of the feed-forward
    steps: int = 1500
    batch: int = 32
    rate: float = 2e-3
    vit_width: int = 64
    vit_steps: int = 600
    vit_batch: int = 64
    vit_rate: float = 1e-3


def make_tokenizer(texts: list[str], path: Path, pieces: int) -> None:
    """Train a sentencepiece unigram model with T5's special ids: pad 0, eos 1, unk 2, no bos."""
    counts = Counter(" ".join(texts).split())
    # Square roots, so that prompts do not crowd out the pieces that rare names are made of.
    words = [word for word, count in counts.items() for _ in range(math.isqrt(count))]
    known = {word.strip(".,:;") for word, count in counts.items() if count >= 20}
    known |= {"none", *" ".join(ASK.values()).split(), *(f"O{k}" for k in range(10))}
    # The trainer proposes a piece only if it occurs in two different words: hence the endings.
    words += [word + ending for word in sorted(known) for ending in ("", ",", ".")] * 20
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, model_type="unigram",
            vocab_size=pieces, hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)


def train(loss_of: Callable[[float], Tensor], parameters: list[torch.nn.Parameter],
          steps: int, rate: float, title: str) -> None:
    """Adam on loss_of(progress in 0..1): a short warmup, then half a cosine of the rate to zero."""
    optimizer = torch.optim.Adam(parameters, rate, betas=(.9, .98), fused=True)
    mean, warmup = None, max(1, min(50, steps // 10))
    bar = Bar(range(steps), desc=title, unit="step")
    for step in bar:
        factor = min(1.0, (step + 1) / warmup) * (.5 + .5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else .98 * mean + .02 * loss.item()
        bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)


@torch.no_grad()
def start_mimetic(model: T5) -> None:
    """Mimetic initialisation (Trockman and Kolter, arXiv 2305.09828): start where training leads.

    Queries equal keys, so that like attends to like; values and outputs make a near identity, so
    that what is attended to is copied; and some heads prefer neighbours. Copying appears within a
    few hundred steps; from T5's own random start it had not appeared after 1,500."""
    for module in model.modules():
        if isinstance(module, Attention):
            width = module.k.weight.shape[0]
            torch.nn.init.orthogonal_(module.k.weight)
            module.q.weight.copy_(module.k.weight * (width // module.heads) ** -.5)
            torch.nn.init.orthogonal_(module.v.weight)
            module.o.weight.copy_(module.v.weight.T)
    after = model.config.relative_attention_num_buckets // 2  # buckets of keys to the right
    model.encoder.relative_bias.weight[[1, after + 1, 2], [0, 1, 2]] += 7.0  # [buckets, heads]
    model.decoder.relative_bias.weight[[1, 2], [0, 1]] += 7.0


def make_t5(lessons: Lessons, tiny: Tiny, seed: int, speed_up: Callable[[T5], object]) -> T5:
    """A tiny T5 with v1.1's feed-forward and a tied head, trained on the lessons."""
    torch.manual_seed(seed)
    model = T5(T5Config(
        vocab_size=lessons.tokenizer.vocab_size + 100, d_model=tiny.width, num_heads=tiny.heads,
        d_kv=tiny.width // tiny.heads, d_ff=tiny.inner, num_layers=tiny.layers,
        dropout_rate=0.0, feed_forward_proj="gated-gelu")).train()
    start_mimetic(model)
    speed_up(model)

    def loss_of(progress: float) -> Tensor:
        lessons.level = min(1.0, 1.5 * progress)
        inputs, labels = lessons.batch(tiny.batch)
        return model(inputs, inputs != 0, labels)[1]

    train(loss_of, list(model.parameters()), tiny.steps, tiny.rate, "tiny T5")
    return model.eval()


def make_vit(tiny: Tiny, seed: int) -> ViT:
    """A tiny ViT, trained to tell which glyphs in which colours are in a picture or a crop."""
    rng = random.Random(f"{seed}/vit")
    torch.manual_seed(seed)
    model = ViT(ViTConfig(hidden_size=tiny.vit_width, num_hidden_layers=3, num_attention_heads=4,
                          intermediate_size=2 * tiny.vit_width, image_size=32, patch_size=8))
    classes = [(glyph, colour) for glyph in GLYPHS for colour in COLOURS]
    head = torch.nn.Linear(tiny.vit_width, len(classes))

    def loss_of(_: float) -> Tensor:
        pixels, truth = [], []
        while len(pixels) < tiny.vit_batch:
            things = rng.choices(classes, k=rng.randint(0, MAX_OBJECTS))
            pixels += model.views(*draw_scene(things, rng))[0]
            truth += [[float(label in seen) for label in classes]
                      for seen in (things, *([thing] for thing in things))]
        logits = head(model(torch.stack(pixels))[:, 0])
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(truth))

    parameters = [*model.parameters(), *head.parameters()]
    train(loss_of, parameters, tiny.vit_steps, tiny.vit_rate, "tiny ViT")
    return model.eval()


def make_backbone(dst: str | Path, texts: list[str], seed: int = 0, tiny: Tiny = Tiny(),
                  avoid: Iterable[str] = (),
                  speed_up: Callable[[T5], object] = lambda model: None) -> None:
    """Make dst/t5 (with spiece.model) and dst/vit in Hugging Face's layout.

    texts: the inputs of a corpus' training rows.  avoid: words that no lesson may have as a key,
    which are the corpus' labels.  speed_up puts faster forms into the T5 before it is trained."""
    t5, vit = Path(dst) / "t5", Path(dst) / "vit"
    make_tokenizer(texts, t5 / "spiece.model", tiny.pieces)
    lessons = Lessons(texts, set(avoid), Tokenizer(t5), random.Random(f"{seed}/lessons"))
    make_t5(lessons, tiny, seed, speed_up).save_pretrained(t5)
    make_vit(tiny, seed).save_pretrained(vit)


def training_text(corpus: Path) -> tuple[list[str], set[str]]:
    """What make_backbone takes of a corpus: the inputs of its training rows, and the words of its
    labels."""
    datasets = load_datasets(corpus)
    texts = ["".join(prompt(record, datasets[record.dataset]))
             for record in load_corpus(corpus, "train")]
    labels = json.dumps([dataset.labels for dataset in datasets.values()])
    return texts, set(re.findall(r"\w+", labels))


def ship_backbone(folder: Path, corpus: Path, seed: int, steps: int, knobs: str = "") -> None:
    """Make a backbone for a corpus in half precision, with manifest.json beside it: the command,
    which ends in `knobs`, commit, processor and versions that made it, sha256 of each file."""
    texts, avoid = training_text(corpus)
    tiny = Tiny(steps=steps, vit_steps=max(1, 2 * steps // 5))
    make_backbone(folder, texts, seed, tiny, avoid)
    for model, name in ((T5, "t5"), (ViT, "vit")):
        model.from_pretrained(folder / name).half().save_pretrained(folder / name)
    made_by = {"command": f"python demo.py --backbone {folder.name} --seed {seed} --steps {steps}"
               + knobs,
               "commit": commit(), "processor": processor(), "python": platform.python_version(),
               "torch": torch.__version__, "sentencepiece": sentencepiece.__version__,
               "sha256": {file.relative_to(folder).as_posix(): file_hash(file)
                          for file in sorted(folder.glob("*/*"))}}
    (folder / "manifest.json").write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The commit of this file's repository, with "-dirty" if files differ; None without git."""
    told = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                          cwd=SHIPPED.parent, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def processor() -> str:
    """This machine's processor, as Linux names it, its instruction set and torch's threads."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (f"{names[0] if names else platform.processor()}, "
            f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")


def above_zero(word: str) -> float:
    """A number above zero, from the command line; ValueError for another, which argparse names."""
    if not 0 < (number := float(word)) < math.inf:
        raise ValueError
    return number


def main() -> None:
    command = Parser(description="Write the demo world, seven small units with drawn pictures; "
                     "with --backbone, make a tiny T5 and a tiny ViT that have read its texts.")
    add = command.add_argument_group("the world").add_argument
    add("dst", metavar="DST", nargs="?", help="folder of the corpus")
    add("--seed", type=int, default=0, help="same seed, same bytes")
    add("--scale", type=above_zero, default=1.0, metavar="X", help="factor on every split's size")
    add("--texts", type=above_zero, default=1.0, metavar="X",
        help="factor on the training splits' sizes")
    add("--imbalance", type=above_zero, metavar="RATIO", help="training texts of the largest "
        "dataset to those of the smallest, in the order of the paper's Table 1; default: the "
        f"demo's own sizes, {max(SIZES.values()) / min(SIZES.values()):.2f} to 1")
    add("--conflict", choices=CONFLICTS, default="apart", help="how far the tasks agree on labels: "
        "one word for what is drawn in all of them, words of their own, one task that means other "
        "things by the same words, or all three")
    add = command.add_argument_group("the backbone").add_argument
    add("--backbone", type=Path, metavar="DIR", help="folder to make t5/ and vit/ in, for "
        "`train.py --t5 DIR/t5 --vit DIR/vit`")
    add("--steps", type=int, default=4500, help="of the T5; the ViT takes two fifths")
    args = command.parse_args()
    if not (args.dst or args.backbone):
        command.error("expected DST, --backbone DIR or both, got neither; name a folder to write")
    knobs = {name: vars(args)[name] for name in ("scale", "texts", "imbalance", "conflict")}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(args.dst) if args.dst else Path(scratch, "world")
        try:
            for name, splits in make_world(corpus, args.seed, **knobs).items():
                print(f"{corpus}/{name}: " + ", ".join(f"{n} {s}" for s, n in splits.items()))
            if args.backbone:
                turned = (f" --{name} {value}" for name, value in knobs.items()
                          if value != command.get_default(name))
                ship_backbone(args.backbone, corpus, args.seed, args.steps, "".join(turned))
        except OSError as error:
            command.exit(2, f"error: {error.filename or corpus}: cannot be written "
                         f"({error.strerror}): give another folder or make room\n")


if __name__ == "__main__":
    main()
