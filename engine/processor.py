"""How pictures become pixels, by the files of a vision tower's folder."""

from collections.abc import Iterator
from pathlib import Path

from engine.files import WeightsError, read_json
from engine.settings import say_once

# Of an image processor; transformers 5 nests one in processor_config.json where it saves a CLIP.
FILES = ("preprocessor_config.json", "processor_config.json")
TAKEN = ("image_mean", "image_std", "resample")
SIGNS = {*TAKEN, "size", "crop_size", "rescale_factor", "image_processor_type"}
STEPS = ("do_resize", "do_rescale", "do_normalize")  # always taken; CHOICES: as the folder says or
CHOICES = (*STEPS, "do_center_crop", "do_convert_rgb")  # as a line says


def picture_settings(folder: Path, size: int) -> dict:
    """{name: value} of TAKEN, as far as a folder says them, whose tower sees size x size pixels.
    WeightsError for a step that is not taken here, and for two files that differ."""
    taken: dict = {}
    for path, processor in processors(folder):
        check_steps(path, processor, size)
        for name in TAKEN:
            value = processor.get(name)
            if value is not None and taken.setdefault(name, value) != value:
                raise WeightsError(f"{path}: expected one {name} in {' and '.join(FILES)}, got "
                                   f"{taken[name]} and {value}; keep that of the tower's training")
    if lacking := [name for name in TAKEN if name not in taken]:
        say_once(f"note: {folder}: {', '.join(lacking)} stand neither in {' nor in '.join(FILES)}: "
                 "the defaults of the tower's family are taken")
    return taken


def processors(folder: Path) -> Iterator[tuple[Path, dict]]:
    """The image processors in a folder's files, each with its file: at the top or one level deep."""
    for path in (folder / name for name in FILES if (folder / name).is_file()):
        raw = read_json(path)
        if not isinstance(nested := raw.get("image_processor", {}), dict):
            raise WeightsError(f"{path}: expected image_processor as an object, got {nested!r}; "
                               "fetch the file anew")
        inner = [value for value in raw.values() if isinstance(value, dict)]
        yield from ((path, processor) for processor in (raw, *inner) if SIGNS & processor.keys())


def check_steps(path: Path, processor: dict, size: int) -> None:
    """WeightsError if a processor does anything else than vision.preprocess, but for cutting: a line
    says that pictures are squeezed."""
    off = [name for name, value in processor.items() if name.startswith("do_") and value is not None
           and (not value if name in STEPS else value and name not in CHOICES)]
    factor = processor.get("rescale_factor")
    if factor is not None and not (isinstance(factor, (int, float)) and abs(255 * factor - 1) < .001):
        off.append("rescale_factor")
    cuts = processor.get("do_center_crop")
    given = (cuts is not False and processor.get("crop_size")) or processor.get("size") or size
    edges = given if isinstance(given, dict) else {"height": given}
    known = edges.keys() <= {"height", "width", "shortest_edge"}
    if off or not known or any(edge != size for edge in edges.values()):
        got = ", ".join([f"size {given}", *(f"{name} {processor[name]}" for name in off)])
        raise WeightsError(f"{path}: expected size {size} as in config.json, do_resize, do_rescale "
                           f"by 1/255, do_normalize and no other step, got {got}; take the files "
                           "of one checkpoint, or another tower")
    if cuts or "shortest_edge" in edges:
        say_once(f"note: {path}: cuts out the centre of a picture; here all of it is squeezed to "
                 f"{size} x {size} pixels, as an object may lie anywhere")
