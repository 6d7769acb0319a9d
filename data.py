"""From a record to the tensors that a model reads, and from its answer back to facts.

In reading order: prompts, targets and how answers are read; T5's tokenizer; examples and batches.
What a record is stands at the top of engine/schema.py.

A prompt states the task and its labels first and the text last: only text is ever truncated.
The model answers in this grammar (text is percent-escaped where it looks like structure):

    mner = "none" | type, text {<spot> type, text}          med = the same with fillers
    mre  = head <spot> relation <spot> tail
    meae = "none" | event {<asoc> event}                    event  = type {<spot> role, filler}
    <spot>, <asoc>: T5's <extra_id_0>, <extra_id_1>         filler = text | O0 | O1 | O2 ...

O1, O2, ... are the objects of the record's image, O0 is the whole image.

References: C-LoRAE (arXiv 2505.06303), UMIE (Sun et al., AAAI 2024), T5 (Raffel et al., 2020).
Shape legend: B batch, S source tokens, T target tokens, V visual tokens, F image-feature width.
"""

import hashlib
import math
import os
import re
import sys
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.command import moved
from engine.corpus import read_bytes
from engine.pieces import rebuilt, tokenizer_file
from engine.schema import TASKS, UNITS, Box, DataError, Dataset, Record, Span

# ---------------------------------------------------------------------------- prompts, targets
RESERVED = re.compile(r"<(?=(?:spot|asoc|pad|unk|s|/s|extra_id_[0-9]+)>)")  # of special tokens
OBJECT = re.compile("O([0-9]+)")
BLANKS = re.compile("[\u061c\u200b-\u200f\u2581\ufeff\ufffd]")  # what T5 reads as a blank


def canon(text: str) -> str:
    """The text as T5's tokenizer normalises it: NFKC, and single blanks."""
    return " ".join(BLANKS.sub(" ", unicodedata.normalize("NFKC", text)).split())


def escape(text: str, filler: bool = False) -> str:
    """The text with %3C for the < of special tokens, %25 for a % that looks like an escape, and, in
    a filler, %4F for the O of a word that looks like an object; as the tokenizer will have it, for
    which O with a subscript 2 is O2. A text without all of these stays as it is."""
    normal = canon(text)
    if filler and OBJECT.fullmatch(normal):
        return "%4F" + normal[1:]
    escaped = RESERVED.sub("%3C", re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", normal))
    return text if escaped == normal else escaped


def unescape(text: str) -> str:
    """The reverse of `escape`."""
    return re.sub("%(25|3C|4F)", lambda match: chr(int(match[1], 16)), text)


def words(record: Record, span: Span) -> str:
    """The text of a span."""
    return " ".join(record.tokens[span[0]:span[1]])


def prompt(record: Record, dataset: Dataset) -> tuple[str, str]:
    """(prefix, text): the model reads prefix + text, and only the text may be truncated."""
    labels = dataset.labels[record.task]
    choices = ", ".join(sorted(labels))
    if record.task == "meae":
        choices = "; ".join(f"{name}: {', '.join(sorted(labels[name]))}" for name in sorted(labels))
    wanted = {"mner": "the following entity type", "med": "event trigger", "meae": "event argument"}
    if record.task == "mre":
        head, tail = (escape(words(record, span)) for span in (record.head, record.tail))
        wanted["mre"] = f"the following relation between {head} and {tail}"
    text = escape(" ".join(record.tokens)) or "none"
    return f"Please extract {wanted[record.task]}: {choices}. Text: ", text


@dataclass(frozen=True)
class Item:
    """A gold or predicted fact as metrics compare it: a label, and the span, the box or the whole
    image where it holds. A relation has no such place; a prediction whose place is not found has
    none either, and never matches."""
    label: str                                       # entity type, relation or event type
    role: str | None = None                          # of an argument
    span: Span | None = None
    box: Box | None = None
    whole_image: bool = False
    text: str | None = None                          # the words; "Ok" for the k-th object
    object: int | None = field(default=None, compare=False)      # that k, 0 = whole image
    event: int = field(default=0, compare=False)     # an argument's event, counted from 0


def sorted_events(record: Record) -> list[dict]:
    """The gold events of a record in the order of their triggers, then those without trigger."""
    return sorted(record.events, key=lambda event: event["trigger"] or (math.inf,))


def gold_items(record: Record) -> list[Item]:
    """The gold facts of a record in the order of its target.

    Entities and triggers are ordered by offset; arguments event by event: those in the text by
    offset, then objects by number, then boxes that no object shows, which no target can name."""
    def located(label: str, span: Span | None, number: int | None = None, role: str | None = None,
                box: Box | None = None, event: int = 0) -> Item:
        text = words(record, span) if span else None if number is None else f"O{number}"
        return Item(label, role, span, box, number == 0, text, number, event)

    def order(argument: dict) -> tuple:
        return argument.get("span") or (math.inf,), argument.get("object") or math.inf

    if record.task == "mre":
        return [Item(record.relation)]
    if record.task == "mner":
        places = sorted((e["start"], e["end"], e["type"]) for e in record.entities)
        return [located(label, (start, end)) for start, end, label in places]
    events = sorted_events(record)
    if record.task == "med":
        return [located(e["type"], e["trigger"], None if e["trigger"] else 0) for e in events]
    return [located(e["type"], a.get("span"), a.get("object"), a["role"], a.get("box"), k)
            for k, e in enumerate(events) for a in sorted(e["arguments"], key=order)]


def target_groups(record: Record, visible: int | None = None) -> list[list[str]]:
    """The target as groups (to be joined by <asoc>) of items (to be joined by <spot>).

    visible: number of leading tokens that the model can see (None: all); items whose span ends
    beyond are left out. A relation is always kept, as its prompt names head and tail."""
    if record.task == "mre":
        head, tail = (escape(words(record, span)) for span in (record.head, record.tail))
        return [[head, record.relation, tail]]
    meae = record.task == "meae"
    groups = [[event["type"]] for event in sorted_events(record)] if meae else [[]]
    for item in gold_items(record):
        cut_off = item.span and visible is not None and item.span[1] > visible
        if item.text is not None and not cut_off:    # a box that no object shows has no text
            text = escape(item.text, record.task != "mner") if item.span else item.text
            groups[item.event].append(f"{item.role or item.label}, {text}")
    return groups


def join_groups(groups: list[list[str]]) -> str:
    """The groups of target_groups() as a target string."""
    return " <asoc> ".join(" <spot> ".join(group) for group in groups) or "none"


def target(record: Record) -> str:
    """The string that the model should write for a record."""
    return join_groups(target_groups(record))


def split_item(item: str, labels: Iterable[str]) -> tuple[str, str] | None:
    """"label, text" -> (label, text), or None if it has no label of `labels`, or no text. Where the
    comma is missing, the label is the longest one that the item begins with."""
    label, comma, text = item.partition(",")
    label = label.strip(" ").lower()
    if not comma:
        label = max((x for x in labels if item.lower().startswith(x + " ")), key=len, default="")
        text = item[len(label):]
    text = text.strip(" ")
    return (label, text) if label in labels and text else None


def parse(task: str, text: str, labels: list | dict, cut: bool = False) -> tuple[list[Item], int]:
    """Read a model's output leniently -> (items without spans and boxes, number of malformed ones).

    labels: dataset.labels[task]. cut: the output hit the length limit: its last item may be
    incomplete, is dropped and counts as malformed. mre always gives one item, "none" where no
    relation is readable."""
    text = re.sub(r"\s+", " ", re.sub("<pad>|</s>", " ", text), flags=re.ASCII).strip(" ")
    groups = re.split(" ?<asoc> ?", text) if task == "meae" else [text]
    groups = [re.split(" ?<spot> ?", group) for group in groups]
    if task == "mre":
        [fields] = groups
        label = fields[len(fields) // 2].lower()
        known = len(fields) in (1, 3) and label in labels
        return [Item(label if known else "none")], int(not known)
    if text in ("", "none"):
        return [], 0
    if cut:
        groups[-1].pop()
    items, malformed = [], int(cut)
    for event, group in enumerate(groups):
        event_type, allowed = None, labels           # an item of meae is "role, filler"
        if task == "meae" and group:
            event_type = group.pop(0).lower()
            allowed = labels.get(event_type, ())
            malformed += event_type not in labels and not group
        pairs = [split_item(item, allowed) for item in group]
        malformed += pairs.count(None)
        for label, filler in filter(None, pairs):
            match = OBJECT.fullmatch(filler) if task != "mner" else None
            number = int(match[1][:9]) if match else None    # more digits are beyond any list too
            items.append(Item(event_type or label, label if event_type else None, object=number,
                              event=event, text=filler if match else unescape(filler)))
    return items, malformed


def occurrences(tokens: list[str], text: str) -> list[Span]:
    """All spans whose tokens, joined by blanks, are `text`, left to right; all in one form."""
    spans = []
    for start in (i for i, token in enumerate(tokens) if token and text.startswith(token)):
        joined, end = tokens[start], start + 1
        while len(joined) < len(text) and end < len(tokens):
            joined, end = joined + (" " + tokens[end] if tokens[end] else ""), end + 1
        spans += [(start, end)] if joined == text else []
    return spans


def predicted_items(record: Record, text: str, dataset: Dataset,
                    triggers: dict[str, list[int]] | None = None, cut: bool = False,
                    written: Callable[[str], str] = canon) -> tuple[list[Item], int]:
    """What parse() returns for a model's output, with the spans and boxes of its items, and the
    words of a span as the record has them.

    The k-th entity or trigger of one label and text is the k-th occurrence of the text. The same
    word may trigger events of other types too; an entity of another type is an occurrence that no
    item has yet, if there is one. An argument is the occurrence nearest to its event's trigger,
    each used once for a role. triggers: {event type: first tokens} as predicted for the same
    sample; the k-th event of a type has the k-th of them, or the last. Where none is known, the
    first occurrence is meant. written: Tokenizer.written, as tokens are compared with what that
    tokenizer has decoded."""
    parsed, malformed = parse(record.task, text, dataset.labels[record.task], cut)
    types = [group.partition("<spot>")[0].strip().lower() for group in text.split("<asoc>")]
    tokens, used, items = [], set(), []
    for item in parsed:
        if item.object is not None:                  # a number beyond the list has no box
            exists = item.role and 0 < item.object <= len(record.objects)
            item = replace(item, box=record.objects[item.object - 1] if exists else None,
                           whole_image=item.object == 0)
        elif item.text is not None:
            tokens = tokens or list(map(written, record.tokens))
            starts = (triggers or {}).get(item.label, [0]) if item.role else [0]
            trigger = starts[min(types[:item.event].count(item.label), len(starts) - 1)]
            taken = {span for *_, span in used} if record.task == "mner" else ()
            unused = [span for span in occurrences(tokens, item.text)
                      if (item.event, item.label, item.role, span) not in used]
            nearest = min(unused, key=lambda span: (span in taken, abs(span[0] - trigger)),
                          default=None)
            if nearest:
                used.add((item.event, item.label, item.role, nearest))
                item = replace(item, span=nearest, text=words(record, nearest))
        items.append(item)
    return items, malformed


# ---------------------------------------------------------------------------- tokenizer
SENTINEL = re.compile(r"<(?:spot|asoc|extra_id_(0|[1-9][0-9]?))>")
STRUCTURE = ("<spot>", "<asoc>")                     # stand for <extra_id_0> and <extra_id_1>


class Tokenizer:
    """T5's tokenizer: sentencepiece for text, T5's sentinels <extra_id_k> for structure.

    path: a sentencepiece model, or a folder that holds it as spiece.model or, saved by transformers
    5, as tokenizer.json. With n pieces, <extra_id_k> has the id n + 99 - k."""

    def __init__(self, path: str | os.PathLike):
        path = tokenizer_file(Path(path)) if Path(path).is_dir() else Path(path)
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(
                rebuilt(path) if path.suffix == ".json" else read_bytes(path))
        except RuntimeError:
            raise DataError(f"{path}: expected a sentencepiece model: fetch the file again "
                            "(T5 calls it spiece.model)") from None
        self.vocab_size = self.pieces.get_piece_size()
        self.pad_id, self.eos_id = self.pieces.pad_id(), self.pieces.eos_id()
        if min(self.pad_id, self.eos_id) < 0:
            raise DataError(f"{path}: expected pad and eos pieces, got ids {self.pad_id} and "
                            f"{self.eos_id}: use a T5 model's own file")
        self.spot_id, self.asoc_id = self.vocab_size + 99, self.vocab_size + 98

    def encode(self, text: str) -> list[int]:
        """Ids of `text` and eos; each piece of text between sentinels is encoded by itself."""
        ids, start = [], 0
        for match in SENTINEL.finditer(text):
            k = int(match[1]) if match[1] else STRUCTURE.index(match[0])
            ids += self.pieces.encode(text[start:match.start()]) + [self.spot_id - k]
            start = match.end()
        return ids + self.pieces.encode(text[start:]) + [self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to eos; <spot>, <asoc> and <extra_id_k> stay visible, pad does not."""
        texts, pieces = [], []                       # decoded; pieces since the last sentinel
        for i in map(int, ids):
            if i == self.eos_id:
                break
            k = self.spot_id - i
            if 0 <= i < self.vocab_size:
                pieces += [i] if i != self.pad_id else []
            elif 0 <= k < 100:
                name = STRUCTURE[k] if k < len(STRUCTURE) else f"<extra_id_{k}>"
                texts, pieces = texts + [self.pieces.decode(pieces), name], []
            else:
                raise DataError(f"decode: id {i} is neither one of {self.vocab_size} pieces nor a "
                                "sentinel: ban undecodable() ids when generating")
        return " ".join(text for text in texts + [self.pieces.decode(pieces)] if text)

    def written(self, text: str) -> str:
        """Words of a text as they come back in an answer: normalised, with single blanks, and with
        "\u2047" for characters that no piece has."""
        return " ".join(unescape(self.decode(self.encode(escape(text)))).split())

    def undecodable(self, vocab_size: int) -> list[int]:
        """Ids below vocab_size (the model's) that no answer may hold: never generate them."""
        allowed = {i for i in range(self.vocab_size) if not self.pieces.is_control(i)}
        allowed |= {self.pad_id, self.eos_id, self.spot_id, self.asoc_id}
        return [i for i in range(vocab_size) if i not in allowed]


# ---------------------------------------------------------------------------- examples, batches
@dataclass(frozen=True)
class Example:
    """A record as ids. unit and task: positions in UNITS and TASKS; row: position in its split."""
    record: Record
    unit: int
    task: int
    input_ids: list[int]
    labels: list[int]
    row: int


def encode_records(records: list[Record], datasets: dict[str, Dataset], tokenizer: Tokenizer,
                   max_source: int = 256, max_target: int = 192,
                   announce: Callable[[str], None] = print) -> list[Example]:
    """Records -> examples of at most max_source and max_target ids, eos included.

    Only text is truncated: a prefix that does not fit is a DataError. Items whose words were cut
    off are left out of the target, and so are the last items of a target that is too long; both
    are counted and announced, and so are, by dataset and file, the texts and targets with
    characters that no piece has. Metrics compare with the record's gold, which stays whole."""
    examples, lost, unknown, unk = [], Counter(), {}, tokenizer.pieces.unk_id()
    for row, record in enumerate(records):
        dataset = datasets[record.dataset]
        input_ids, visible = encode_source(record, dataset, tokenizer, max_source)
        groups = target_groups(record, visible)
        labels, dropped = encode_target(record, groups, tokenizer, max_target)
        lost.update(texts=int(visible is not None), too_long=dropped,
                    items=sum(map(len, target_groups(record))) - sum(map(len, groups)))
        task = TASKS.index("mee" if record.task in ("med", "meae") else record.task)
        unit = UNITS.index(dataset.units[record.task])
        examples.append(Example(record, unit, task, input_ids, labels, row))
        counts = unknown.setdefault(f"{record.dataset} {Path(record.source).stem}", Counter())
        counts.update(rows=1, texts=int(unk in input_ids), targets=int(unk in labels))
    if lost.total():
        announce(f"truncation: {lost['texts']} of {len(records)} texts cut to {max_source} ids; "
                 f"targets lost {lost['items']} items with the text and {lost['too_long']} beyond "
                 f"{max_target} ids (raised by train.py --max-target)")
    if lines := [f"{name} {n['texts']} of {n['rows']} texts and {n['targets']} targets"
                 for name, n in unknown.items() if n["texts"]]:
        announce(f"unknown characters, which the tokenizer lacks, are in {', '.join(lines)}")
    return examples


def check_labels(used: set[tuple[str, str]], datasets: dict[str, Dataset],
                 tokenizer: Tokenizer) -> None:
    """DataError that names every label of the (dataset, task) used which comes back from the
    tokenizer in another form, so that no answer with it is right: for training, not scoring."""
    lines = []
    for name, task in sorted(used):
        labels = datasets[name].labels[task]
        roles = sum(map(list, labels.values()), []) if task == "meae" else []
        lines += [f'\n  {name}: {task}: "{label}" comes back as "{answer}"' for label in sorted(
            {*labels, *roles}) if (answer := tokenizer.written(label)) != label]
    if lines:
        raise DataError(f"expected labels that the tokenizer can write, got{''.join(lines)}\n"
                        "rename them in dataset.json and records, or take a T5 that can")


def encode_source(record: Record, dataset: Dataset, tokenizer: Tokenizer,
                  limit: int) -> tuple[list[int], int | None]:
    """(ids of the prompt, number of leading tokens that it holds in full; None: all of them)."""
    prefix, text = prompt(record, dataset)
    ids = tokenizer.encode(prefix + text)
    if len(ids) <= limit:
        return ids, None
    if (least := len(tokenizer.encode(prefix))) >= limit:
        raise DataError(f"{record.source}: the {record.task} instruction of {record.dataset} takes "
                        f"{least} ids, which leaves no room for text in {limit}: raise the limit")
    whole = bisect_right(range(1, len(record.tokens)), limit, key=lambda count: len(
        tokenizer.encode(prefix + escape(" ".join(record.tokens[:count])))))
    return ids[:limit - 1] + [tokenizer.eos_id], whole


def encode_target(record: Record, groups: list[list[str]], tokenizer: Tokenizer,
                  limit: int) -> tuple[list[int], int]:
    """(ids of the target, number of its last items that were dropped to make it fit)."""
    count = sum(map(len, groups))
    while len(ids := tokenizer.encode(join_groups(groups))) > limit and any(groups):
        if record.task == "mre" and len(groups[0]) > 1:
            groups = [[record.relation]]             # which parse() reads as well
        else:
            groups = [group for group in (*groups[:-1], groups[-1][:-1]) if group]
    return ids, count - sum(map(len, groups))


@dataclass
class Batch:
    """Padded tensors of some examples, rows sorted by task."""
    input_ids: Tensor                                # [B,S] long, padded with 0, T5's pad
    attention_mask: Tensor                           # [B,S] bool
    labels: Tensor                                   # [B,T] long, padded with -100
    tasks: Tensor                                    # [B] long, index into TASKS: the expert
    units: Tensor                                    # [B] long, index into UNITS: the AML weight
    features: Tensor                                 # [B,V,F] float32, of the image and its objects
    boxes: Tensor                                    # [B,V,5] float32, see vision.normalise_boxes
    visual_mask: Tensor                              # [B,V] bool; V = 0 when no row has an image
    rows: Tensor                                     # [B] long, Example.row
    real: Tensor | None = None                       # [n] long, where labels.flatten() != -100

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, without `tasks` and `rows`: the host reads these, and would have
        to wait for a GPU to get them back."""
        return replace(self, **{name: value.to(device, non_blocking=True)
                                for name, value in vars(self).items()
                                if value is not None and name not in ("tasks", "rows")})

    def widened(self, most_visual: int) -> "Batch":
        """The batch padded to one of few shapes, so that few CUDA graphs serve all batches.

        B becomes a multiple of 4 (by rows that are all padding), S and T of 16, V of 6 but at most
        most_visual. `real` lists all labels, so its length depends on nothing but the shape."""
        (B, S), T, V = self.input_ids.shape, self.labels.shape[1], self.features.shape[1]
        extra = {"B": -B % 4, "S": -S % 16, "T": -T % 16, "V": min(-V % 6, most_visual - V), "F": 0}
        padding = {"labels": -100, "tasks": int(self.tasks.max()), "rows": -1}  # of others 0
        shapes = {"input_ids": "BS", "attention_mask": "BS", "labels": "BT", "tasks": "B",
                  "units": "B", "features": "BVF", "boxes": "BVF", "visual_mask": "BV", "rows": "B"}
        widened = {}
        for name, letters in shapes.items():
            sizes = [n for letter in reversed(letters) for n in (0, extra[letter])]
            widened[name] = F.pad(getattr(self, name), sizes, value=padding.get(name, 0))
        return Batch(**widened, real=torch.arange(widened["labels"].numel()))


def collate(examples: list[Example], features: Callable[[Record], tuple[Tensor, Tensor] | None],
            feature_width: int) -> Batch:
    """Examples -> Batch, stably sorted by task so that each task's rows form one segment.
    features(record): (features [V,F], boxes [V,5]), or None for a record without an image."""
    def padded(rows: list, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, rows)), True, value)

    def mask(rows: list) -> Tensor:
        return padded([torch.ones(len(row), dtype=torch.bool) for row in rows], False)

    examples = sorted(examples, key=lambda example: example.task)
    nothing = torch.zeros(0, feature_width), torch.zeros(0, 5)
    tokens, boxes = zip(*(features(example.record) or nothing for example in examples))
    ids = [example.input_ids for example in examples]
    labels = padded([example.labels for example in examples], -100)
    tasks, units, rows = torch.tensor([(e.task, e.unit, e.row) for e in examples]).T.contiguous()
    return Batch(
        input_ids=padded(ids, 0), attention_mask=mask(ids), labels=labels, tasks=tasks,
        units=units, features=padded(tokens, 0), boxes=padded(boxes, 0), visual_mask=mask(tokens),
        rows=rows, real=(labels.flatten() != -100).nonzero()[:, 0])


def global_batches(examples: list[Example], seed: int, epoch: int,
                   batch_size: int) -> list[list[int]]:
    """One epoch as lists of indices into `examples`, each exactly once; the last may be short. The
    order depends on seed, epoch and the number of examples alone: resuming needs no state."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    order = torch.randperm(len(examples), generator=generator).tolist()
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def micro_batches(indices: list[int], examples: list[Example], rows: int) -> list[list[int]]:
    """`indices` in slices of `rows` examples on average and 2 * rows at most, of similar length.

    The examples are sorted by length and cut so that the sum over slices of (computed tokens)^2 is
    least: then little of it is padding, and processes that get a slice each finish together. Found
    by dynamic programming, with one slice more in each round."""
    order = sorted(indices, key=lambda i: (len(examples[i].input_ids), len(examples[i].labels), i))
    best = {0: (0, [])}                              # {n: (least sum, slices)} of the first n
    for _ in range(math.ceil(len(order) / rows)):
        longer = {}                                  # the same with one slice more
        for stop in range(1, len(order) + 1):
            longest = 0                              # the longest target in order[start:stop]
            for start in range(stop - 1, max(-1, stop - 2 * rows - 1), -1):
                longest = max(longest, len(examples[order[start]].labels))
                width = len(examples[order[stop - 1]].input_ids) + longest
                cost = ((stop - start) * width) ** 2 + best.get(start, (math.inf,))[0]
                if cost < longer.get(stop, (math.inf,))[0]:
                    longer[stop] = cost, best[start][1] + [order[start:stop]]
        best = longer
    return best[len(order)][1]


if __name__ == "__main__":
    tool = "check" if sys.argv[1:2] == ["check"] else "convert"
    moved(f"data.py {tool}", f"python -m tools.{tool}")
