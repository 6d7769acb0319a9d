"""Check a corpus: every record of every dataset, what the splits hold, and what they share.

    python -m tools.check DIR [--require-images] [--t5 DIR [--size SIZE]]

A text that stands in a test split and in a training split is a leak, also across datasets.  With
a T5's folder: texts and targets that are too long for training at that size, labels that it cannot
write, characters that it lacks, F1 of perfect answers."""

from functools import cache
from itertools import combinations
from pathlib import Path

from data import Tokenizer, check_labels, encode_records, gold_items, prompt, target
from engine.command import Parser
from engine.corpus import load_datasets, normalised, read_split
from engine.files import ImageError
from engine.images import look, resolve_image
from engine.processes import exit_codes
from engine.schema import MAX_PROBLEMS, SPLITS, Dataset, Problems, Record
from engine.settings import Config
from evaluate import Answer, score_rows, total
from vision import normalise_boxes


def shared_texts(texts: dict[tuple[str, str], dict[str, str]]) -> list[str]:
    """A line for each two splits, {(dataset, split): {text: where}}, that share texts, and where
    these stand; test before dev.  What two training splits share is no leak and not listed."""
    order, lines = sorted(texts, key=lambda key: (-SPLITS.index(key[1]), key[0])), []
    for a, b in combinations(order, 2):
        if a[1] != "train" and (both := [text for text in texts[a] if text in texts[b]]):
            lines.append(f"{' '.join(a)} in {' '.join(b)}: {len(both)} of {len(texts[a])} texts")
            lines += [f"  {texts[a][text]} = {texts[b][text]}" for text in both[:MAX_PROBLEMS]]
            lines += [f"  and {len(both) - MAX_PROBLEMS} more"] * (len(both) > MAX_PROBLEMS)
    return lines


def check(corpus: Path, require_images: bool, t5: Path | None = None,
          config: Config | None = None) -> None:
    """Validate every split of every dataset; print what it holds, and what two splits share.
    DataError names all problems; with require_images each picture that is not there, or that
    training could not open, is one.  t5: a T5's folder, see `perfect_answers`; config: lengths."""
    problems, texts, judge = Problems(), {}, cache(fault)  # records may share a picture
    tokenizer, config = t5 and Tokenizer(t5), (config or Config()).resolved()
    config.check()
    for name, dataset in load_datasets(corpus).items():
        images = corpus / name / "images"
        splits = [s for s in SPLITS if (corpus / name / f"{s}.jsonl").exists()]
        if not splits:
            problems.add(str(corpus / name), "files", f"none of {', '.join(SPLITS)}.jsonl is here: "
                         "convert the dataset again")
        for split in sorted({*SPLITS} - {*splits}):
            print(f"{name}: no {split}.jsonl")
        for split in splits:
            records = read_split(corpus / name, split, dataset, problems)
            texts[name, split] = {text: r.source for r in records if (text := normalised(r))}
            for task in dataset.units:
                of_task = [record for record in records if record.task == task]
                print(f"{name} {split} {task}: {summary(of_task, dataset, images)}")
            if tokenizer:
                perfect_answers(records, dataset, split, tokenizer, config)
            for record in records if require_images else ():
                path = record.image and resolve_image(images, record.image)
                if path and (problem := judge(path, record.objects, record.size)):
                    problems.add(record.source, "image", problem)
    if not tokenizer:
        print("characters that a tokenizer lacks were not counted: give a T5 by --t5 DIR")
    print("\n".join(shared_texts(texts)) or "no text stands in two splits")
    problems.raise_if_any()


def fault(path: Path, boxes: tuple, size: tuple | None) -> str | None:
    """What keeps training from opening a picture with these boxes; None if nothing does."""
    if not path.exists():
        return f"{path} is not there: put it there or write null"
    try:
        look(path, boxes, size, lambda image, boxes: normalise_boxes(boxes, image.size))
    except ImageError as problem:
        return str(problem)


def summary(records: list[Record], dataset: Dataset, folder: Path) -> str:
    """The counts of one task's records in one split; folder: where their images are."""
    images = {record.image for record in records if record.image}
    missing = sum(not resolve_image(folder, image).exists() for image in images)
    prompts = max((len("".join(prompt(r, dataset)).split()) for r in records), default=0)
    targets = max((len(target(r).split()) for r in records), default=0)
    items = [item for record in records for item in gold_items(record) if item.label != "none"]
    odd = sum(r.head[0] < r.tail[1] and r.tail[0] < r.head[1] for r in records if r.task == "mre")
    return (f"{len(records)} records, {len(items)} gold items, {len(images)} images ({missing} "
            f"missing), longest prompt {prompts} words, longest target {targets} words"
            + f", {odd} with a head and a tail that overlap" * (odd > 0))


def perfect_answers(records: list[Record], dataset: Dataset, split: str,
                    tokenizer: Tokenizer, config: Config) -> None:
    """Print what training will announce of these records, and the F1 of their targets as the
    tokenizer writes them."""
    datasets = {dataset.name: dataset}
    check_labels({(dataset.name, record.task) for record in records}, datasets, tokenizer)
    examples = encode_records(records, datasets, tokenizer, config.max_source, config.max_target)
    answers = [Answer(tokenizer.decode(example.labels)) for example in examples]
    scores = total(score_rows(records, answers, datasets, tokenizer.written))
    reached = [f"{name} {c.f1:.2f}" for name, c in scores.items() if not set("@:~") & set(name)]
    print(f"{dataset.name} {split}: F1 of perfect answers, up to {config.max_target} ids each: "
          f"{', '.join(reached)}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.check", description="Validate every record of a corpus; "
                    "print counts, lengths and the texts that splits share.")
    add = parser.add_argument_group("what to check").add_argument
    add("dir", type=Path, metavar="DIR", help="corpus folder")
    add("--require-images", action="store_true",
        help="open every picture as training does; one that is missing or cannot be read is an "
             "error instead of a count")
    add("--t5", type=Path, metavar="DIR",
        help="folder of a T5: print what its tokenizer cuts or lacks, and F1 of perfect answers")
    add = parser.add_argument_group("the training whose lengths are taken with --t5").add_argument
    for name in ("size", "max_source", "max_target"):
        spec = Config.__dataclass_fields__[name]
        add("--" + name.replace("_", "-"), default=spec.default, **spec.metadata)
    args = vars(parser.parse_args(argv))
    with exit_codes():
        check(args.pop("dir"), args.pop("require_images"), args.pop("t5"), Config(**args))


if __name__ == "__main__":
    main()
