"""How pictures become pixels, by the files of a vision tower's folder."""

from pathlib import Path

from engine.files import WeightsError, note, read_json

# Both hold an image processor; transformers 5 nests it in the second where it saves a whole CLIP.
FILES = ("preprocessor_config.json", "processor_config.json")
TAKEN = ("image_mean", "image_std", "resample")  # what vision.preprocess is given
SIGNS = {*TAKEN, "size", "crop_size", "rescale_factor", "image_processor_type"}
STEPS = ("do_resize", "do_rescale", "do_normalize")  # what it always does


def picture_settings(folder: Path, size: int) -> dict:
    """{name: value} of TAKEN, as far as a folder says them, whose tower sees size x size pixels.
    WeightsError for a step that is not taken here, and for two processors that differ."""
    taken: dict = {}
    for path in (folder / name for name in FILES if (folder / name).is_file()):
        raw = read_json(path)
        for processor in (raw, *raw.values()):
            if not isinstance(processor, dict) or not SIGNS & processor.keys():
                continue
            check_steps(path, processor, size)
            for name in TAKEN:
                value = processor.get(name)
                if value is not None and taken.setdefault(name, value) != value:
                    raise WeightsError(f"{path}: expected one {name} in {' and '.join(FILES)}, got "
                                       f"{taken[name]} and {value}; keep the tower's own")
    if lacking := ", ".join(name for name in TAKEN if name not in taken):
        note(f"{folder}: no {lacking} in {' or '.join(FILES)}; the defaults of the "
             "tower's family are taken")
    return taken


def check_steps(path: Path, processor: dict, size: int) -> None:
    """WeightsError if a processor does other than vision.preprocess.  One that cuts pictures to
    `size` is let pass, with a line that says that they are squeezed."""
    free = ("do_center_crop", "do_convert_rgb")  # steps that may be on or off; others are off
    off = [name for name, value in processor.items() if name.startswith("do_") and value is not None
           and name not in free and bool(value) != (name in STEPS)]
    factor = processor.get("rescale_factor")
    if factor is not None and not (type(factor) in (int, float) and abs(255 * factor - 1) < .01):
        off.append("rescale_factor")
    cut = processor.get("do_center_crop") is not False and processor.get("crop_size")
    given = cut or processor.get("size") or size
    edges = given if isinstance(given, dict) else {"height": given, "width": given}
    forms = {"height": size, "width": size}, {"shortest_edge": size}
    if off or edges not in forms:
        got = ", ".join([f"size {given}", *(f"{name} {processor[name]}" for name in off)])
        raise WeightsError(f"{path}: expected size {size} as in config.json, do_resize, do_rescale "
                           f"by 1/255, do_normalize and no other step, got {got}; take the files "
                           "of one checkpoint, or another tower")
    if cut or processor.get("do_center_crop") or "shortest_edge" in edges:
        note(f"{path.parent}: its processor cuts out the centre of a picture; here it is "
             f"squeezed to {size} x {size} pixels as a whole, as an object may lie anywhere")
