"""vision.py as a specification: towers, pictures, visual tokens, and the UMIE adapter.

tests/golden/{vit,clip_vision,image} hold tiny random checkpoints and pictures with what
transformers 5.23.0 makes of them (of the pictures every 16th pixel, from row 5, column 3 on).
"""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import vision
from engine.features import FeatureCache
from engine.files import ImageError
from engine.images import load_image, resolve_image
from engine.settings import say_once
from t5 import T5, T5Config, WeightsError
from vision import UMIE, GateFusion, ViT, ViTConfig, normalise_boxes, preprocess

GOLDEN = Path(__file__).parent / "golden"
TINY = ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
                 image_size=16, patch_size=5)  # 3 x 3 patches, the last pixel row is left over


def checkpoint(folder: Path, kind: str, rename=lambda key: key, extra=None, config=None) -> Path:
    """A copy of a golden checkpoint with renamed keys (None: left out), more keys, other config."""
    folder.mkdir()
    tensors = load_file(GOLDEN / kind / "model.safetensors")
    tensors = {rename(k): v for k, v in tensors.items() if rename(k) is not None}
    save_file(tensors | (extra or {}), folder / "model.safetensors")
    raw = json.loads((GOLDEN / kind / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(raw) if config else raw))
    return folder


def assert_golden(folder: Path, kind: str) -> None:
    expected = load_file(GOLDEN / kind / "expected.safetensors")
    with torch.no_grad():
        hidden = ViT.from_pretrained(folder)(expected["pixel_values"])
    torch.testing.assert_close(hidden, expected["last_hidden_state"], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------ towers


@pytest.mark.parametrize("kind", ["vit", "clip_vision"])
def test_a_tower_agrees_with_transformers(kind: str) -> None:
    """last_hidden_state of ViTModel and CLIPVisionModel (quick_gelu) within 1e-4."""
    assert_golden(GOLDEN / kind, kind)


def test_a_classifier_checkpoint_gives_the_same_tower(tmp_path: Path) -> None:
    """ViTForImageClassification: prefix vit., no pooler, a head that is dropped."""
    folder = checkpoint(tmp_path / "c", "vit", extra={"classifier.weight": torch.ones(2, 48)},
                        rename=lambda k: None if k.startswith("pooler") else "vit." + k)
    assert_golden(folder, "vit")


def test_a_tower_trained_by_masking_is_whole(tmp_path: Path) -> None:
    """ViTForMaskedImageModeling: prefix vit., a mask token and a pixel decoder, both dropped."""
    extra = {"vit.embeddings.mask_token": torch.ones(1, 1, 48), "decoder.0.bias": torch.ones(4),
             "decoder.0.weight": torch.ones(4, 48, 1, 1)}
    folder = checkpoint(tmp_path / "c", "vit", extra=extra,
                        rename=lambda k: None if k.startswith("pooler") else "vit." + k)
    assert_golden(folder, "vit")


def test_the_vision_half_of_a_whole_clip_is_found(tmp_path: Path) -> None:
    """CLIPModel: config under vision_config, text keys, projections and index buffers dropped."""
    extra = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(()),
             "visual_projection.weight": torch.ones(2, 48), "text_projection.weight": torch.ones(2),
             "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    folder = checkpoint(tmp_path / "c", "clip_vision", extra=extra,
                        config=lambda raw: {"model_type": "clip", "vision_config": raw})
    assert_golden(folder, "clip_vision")
    assert ViT.feature_width(folder) == 48


def test_half_precision_shards_are_read_as_float32(tmp_path: Path) -> None:
    """fp16 files are cast on reading; an index may spread them over files."""
    tensors = {k: v.half() for k, v in load_file(GOLDEN / "vit" / "model.safetensors").items()}
    parts = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"{number}.safetensors")
    index = {k: f"{n}.safetensors" for n, part in enumerate(parts) for k in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(GOLDEN / "vit" / "config.json", tmp_path)
    expected = load_file(GOLDEN / "vit" / "expected.safetensors")
    hidden = ViT.from_pretrained(tmp_path)(expected["pixel_values"])
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, expected["last_hidden_state"], atol=2e-2, rtol=0)


def test_missing_unknown_and_misshapen_keys_are_named(tmp_path: Path) -> None:
    """Exhaustive both ways: nothing is initialised in silence, nothing is ignored in silence."""
    lost = "encoder.layer.1.output.dense.bias"
    with pytest.raises(WeightsError, match=lost):
        ViT.from_pretrained(checkpoint(tmp_path / "a", "vit", lambda k: None if k == lost else k))
    with pytest.raises(WeightsError, match="encoder.layer.3.oops"):
        ViT.from_pretrained(checkpoint(tmp_path / "b", "vit",
                                       extra={"encoder.layer.3.oops": torch.ones(1)}))
    with pytest.raises(WeightsError, match="position_embeddings"):
        ViT.from_pretrained(checkpoint(tmp_path / "c", "vit",
                                       config=lambda raw: raw | {"image_size": 64}))


@pytest.mark.parametrize("change", [{"model_type": "swin"}, {"model_type": None},
                                    {"hidden_act": "mish"}, {"num_attention_heads": 5},
                                    {"image_size": [32, 32]}, {"patch_size": 0}])
def test_a_config_that_is_not_understood_is_an_error(tmp_path: Path, change: dict) -> None:
    """Unknown families, activations and geometries are refused, never guessed."""
    with pytest.raises(WeightsError, match="ViT or CLIP"):
        ViT.from_pretrained(checkpoint(tmp_path / "c", "vit", config=lambda raw: raw | change))


def test_every_parameter_has_one_name_in_the_file() -> None:
    """The template map is one to one for both families."""
    for kind in vision.FAMILIES:
        names = vision.hub_names(ViT(dataclasses.replace(TINY, model_type=kind)))
        assert len(set(names.values())) == len(names)


def test_a_tower_made_here_is_saved_in_the_hubs_layout(tmp_path: Path) -> None:
    """ViT(config) -> save -> load gives the same outputs, ViTModel's keys, and its processor."""
    config = dataclasses.replace(TINY, image_mean=(0.1, 0.2, 0.3), resample=3, qkv_bias=False)
    vit, pixels = ViT(config).eval(), torch.randn(2, 3, 16, 16)
    vit.save_pretrained(tmp_path)
    again = ViT.from_pretrained(tmp_path)
    assert torch.equal(vit(pixels), again(pixels)) and vit(pixels).shape == (2, 10, 12)
    assert again.preprocessing == (16, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), 3)
    theirs = load_file(GOLDEN / "vit" / "model.safetensors").keys()
    assert load_file(tmp_path / "model.safetensors").keys() < theirs  # layers 0, 1; no q, k, v bias


# As CLIPImageProcessor writes it, in preprocessor_config.json or, nested, in processor_config.json.
CLIP_PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
                  "crop_size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6],
                  "image_std": [0.3, 0.2, 0.1], "resample": 2, "do_resize": True,
                  "do_center_crop": True, "do_convert_rgb": True, "do_rescale": True,
                  "do_normalize": True, "rescale_factor": 1 / 255, "do_pad": None}
TOLD = (32, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1), 2)
CLIPS = (32, vision.CLIP_DEFAULTS["image_mean"], vision.CLIP_DEFAULTS["image_std"], 3)
PLACES = {  # where a folder may have it: {file: content}
    "preprocessor": {"preprocessor_config.json": CLIP_PROCESSOR},
    "processor": {"processor_config.json": {"image_processor": CLIP_PROCESSOR,
                                            "processor_class": "CLIPProcessor"}},
    "another key": {"processor_config.json": {"feature_extractor": CLIP_PROCESSOR}},
    "the top": {"processor_config.json": CLIP_PROCESSOR},
    "both": {"preprocessor_config.json": CLIP_PROCESSOR,
             "processor_config.json": {"image_processor": CLIP_PROCESSOR}},
    "half": {"preprocessor_config.json": {"image_mean": [0.4, 0.5, 0.6]}, "processor_config.json": {
        "image_processor": {"image_std": [0.3, 0.2, 0.1], "resample": 2}}}}


def put(folder: Path, files: dict[str, dict]) -> Path:
    """The folder, with these files and no other of a processor."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["vit", "clip_vision"])
def test_the_processor_is_read_wherever_it_stands(tmp_path: Path, kind: str, place: str) -> None:
    """transformers 5 saves a whole CLIP with processor_config.json alone."""
    folder = put(checkpoint(tmp_path / "c", kind), PLACES[place])
    assert ViT.from_pretrained(folder).preprocessing == TOLD


@pytest.mark.parametrize("files", [
    {}, {"processor_config.json": {"processor_class": "CLIPProcessor"}},
    {"preprocessor_config.json": {"size": 32, "image_mean": None}}], ids=str)
def test_a_folder_that_says_no_mean_gets_the_familys_and_a_line_says_so(
        tmp_path: Path, files: dict, capsys) -> None:
    """Once a process, as every folder is read several times."""
    folder = put(checkpoint(tmp_path / "c", "clip_vision"), files)
    say_once.cache_clear()
    assert ViT.from_pretrained(folder).preprocessing == CLIPS
    assert ViT.feature_width(folder) == 48
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and str(folder) in said
    assert "no image_mean, image_std, resample in preprocessor_config.json or processor" in said


def test_two_files_that_differ_are_refused(tmp_path: Path) -> None:
    """Nobody knows which of them the tower was trained with."""
    folder = checkpoint(tmp_path / "c", "clip_vision")
    for name, value in (("image_mean", [0.5] * 3), ("image_std", [0.5] * 3), ("resample", 3)):
        put(folder, {**PLACES["preprocessor"], "processor_config.json": {
            "image_processor": CLIP_PROCESSOR | {name: value}}})
        with pytest.raises(WeightsError, match=rf"processor_config.json: expected one {name} .* "
                                               "got .* and .*; keep the tower's own"):
            ViT.from_pretrained(folder)


@pytest.mark.parametrize("name, value", [
    ("crop_size", {"height": 999, "width": 999}), ("crop_size", {"height": 32, "width": 24}),
    ("crop_size", 24), ("crop_size", {"longest_edge": 32}), ("crop_size", [32, 32]),
    ("crop_size", {"width": 32}), ("crop_size", {"height": 32, "width": 32, "depth": 3}),
    ("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("do_normalize", 0),
    ("do_pad", True), ("do_flip_channel_order", True), ("rescale_factor", 1 / 127.5),
    ("rescale_factor", 1.0), ("rescale_factor", 0), ("rescale_factor", "1/255"),
    ("rescale_factor", math.nan)])
@pytest.mark.parametrize("place", ["preprocessor", "processor"])
def test_a_step_that_is_not_taken_here_is_refused(tmp_path: Path, place: str, name: str,
                                                  value: object) -> None:
    """Named with its file and value, wherever the processor stands."""
    (file, content), = PLACES[place].items()
    changed = CLIP_PROCESSOR | {name: value}
    content = changed if place == "preprocessor" else content | {"image_processor": changed}
    folder = put(checkpoint(tmp_path / "c", "clip_vision"), {file: content})
    with pytest.raises(WeightsError, match=f"{file}: expected size 32 as in config.json.*, got .*"
                                           f"{'size' if name == 'crop_size' else name} .*; take"):
        ViT.from_pretrained(folder)


@pytest.mark.parametrize("size", [32, {"height": 32, "width": 32}, {"shortest_edge": 32}], ids=str)
def test_the_processor_of_another_checkpoint_is_an_error(tmp_path: Path, size: object) -> None:
    """preprocessor_config.json must fit config.json; sizes of every age of the format are read."""
    folder = checkpoint(tmp_path / "c", "vit")
    put(folder, {"preprocessor_config.json": {"size": size, "crop_size": 24,
                                              "do_center_crop": False}})
    assert ViT.from_pretrained(folder).size == 32
    text = json.dumps({"size": size}).replace("32", "224")
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(WeightsError, match="expected size 32.*got size .*224"):
        ViT.from_pretrained(folder)


def test_a_processor_that_would_cut_the_picture_is_said_once(tmp_path: Path, capsys) -> None:
    """Pictures are squeezed, as objects may lie anywhere; DeiT and CLIP cut out the centre."""
    folder = put(checkpoint(tmp_path / "c", "clip_vision"), {
        "preprocessor_config.json": CLIP_PROCESSOR | {"size": 36, "crop_size": 32},
        "processor_config.json": {"image_processor": CLIP_PROCESSOR}})
    say_once.cache_clear()
    assert ViT.from_pretrained(folder).preprocessing == TOLD and ViT.from_pretrained(folder)
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and f"{folder}: its processor cuts out" in said
    say_once.cache_clear()
    put(folder, {"preprocessor_config.json": {"size": 36, "crop_size": 32}})
    assert ViT.from_pretrained(folder) and "cuts out" in capsys.readouterr().err
    put(folder, {"preprocessor_config.json": CLIP_PROCESSOR | {
        "size": {"height": 32, "width": 32}, "do_center_crop": False}})
    assert ViT.from_pretrained(folder) and capsys.readouterr().err == ""


def test_pictures_of_another_size_are_refused() -> None:
    """The error states the expected and the given size."""
    with pytest.raises(ImageError, match=r"16, 16\], got \[2, 3, 32, 32\]"):
        ViT(TINY)(torch.zeros(2, 3, 32, 32))


# ------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("file", ["0.png", "palette.png", "cmyk.jpg", "exif_rotated.jpg",
                                  "one_pixel.png"])
def test_pixels_agree_with_the_hubs_processor(file: str) -> None:
    """ViTImageProcessor, PIL backend, within 1e-4: RGB, palette, CMYK, EXIF-rotated, one pixel."""
    expected = load_file(GOLDEN / "image" / "expected.safetensors")[file.split(".")[0]]
    pixels = preprocess(load_image(GOLDEN / "image" / file))
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 5::16, 3::16], expected, atol=1e-4, rtol=0)


def test_the_pictures_rotation_is_undone_first(tmp_path: Path) -> None:
    """All eight EXIF orientations load as the same upright picture."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 9, 3), np.uint8))
    undo = {1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
            5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}
    for number, turn in undo.items():
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = number
        stored.save(tmp_path / "i.png", exif=exif)
        assert np.array_equal(load_image(tmp_path / "i.png"), upright), number


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3)])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    """Grey, transparent, palette, 16-bit and CMYK pictures, down to one pixel."""
    path = tmp_path / ("i.jpg" if mode == "CMYK" else "i.png")
    image = (Image.fromarray(np.full(size[::-1], 0x8000, np.uint16)) if mode == "I;16"
             else Image.new("RGBA", size, (128, 128, 128, 9)).convert(mode))
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB" and loaded.size == size
    if mode != "1":
        assert abs(loaded.getpixel((0, 0))[0] - 128) <= 2  # 16 bit: the high byte


def test_a_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    """Transparency is dropped, as the hub's processors do it; what lies below shows."""
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    loaded = load_image(tmp_path / "p.png")
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(200, 0, 0), (0, 100, 0), (0, 0, 50)]


def test_animated_and_lossy_formats_give_their_first_picture(tmp_path: Path) -> None:
    """GIF (first frame) and WebP are on the list of formats."""
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.webp", lossless=True)
    for name in ("a.gif", "a.webp"):
        assert load_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)


def test_plain_names_are_resolved(tmp_path: Path) -> None:
    """Subfolders, blanks, dots and other scripts are fine; links inside and a linked root too."""
    (tmp_path / "img" / "sub").mkdir(parents=True)
    (tmp_path / "img" / "inner").symlink_to("sub")
    (tmp_path / "root").symlink_to("img")
    for name in ("a.jpg", "sub/a.jpg", "VOA.2016 (1).jpg", "\u00fc\u4e2d.png", "..a.jpg", "a..jpg"):
        assert resolve_image(tmp_path / "root", name) == (tmp_path / "img" / name).resolve()
    assert resolve_image(tmp_path / "img", "inner/a.jpg") == (tmp_path / "img/sub/a.jpg").resolve()


# ------------------------------------------------------------------------------ visual tokens


def test_boxes_become_shares_of_the_picture() -> None:
    """(x1/w, y1/h, x2/w, y2/h, area/(w h)); token 0 is the whole picture, 0 0 1 1 1."""
    boxes = normalise_boxes([[10, 20, 30, 60], [-0.5, 0, 200.5, 80]], (200, 80))
    expected = [[0, 0, 1, 1, 1], [0.05, 0.25, 0.15, 0.75, 0.05], [0, 0, 1, 1, 1]]
    torch.testing.assert_close(boxes, torch.tensor(expected))


@pytest.mark.parametrize("box", [[0, 0, 12, 5], [-2, 0, 5, 5], [5, 0, 4, 5], [0, 3, 5, 2],
                                 [0, 0, math.nan, 5], [0, 0, math.inf, 5], [0, 0, 5]])
def test_a_box_outside_its_picture_is_an_error(box: list[float]) -> None:
    """More than a pixel outside, reversed, not a number, not four numbers."""
    with pytest.raises(ImageError, match="box"):
        normalise_boxes([box], (10, 10))


def test_a_crop_holds_at_least_one_pixel() -> None:
    """All pixels a box touches; a box thinner than a pixel, even at the far edge, gives one."""
    image = Image.new("RGB", (10, 8))
    for box, size in (
            ([2, 3, 5, 8], (3, 5)), ([2.9, 3.1, 4.1, 3.2], (3, 1)), ([4, 4, 4, 4], (1, 1)),
            ([10, 8, 10, 8], (1, 1)), ([-1, -1, 11, 9], (10, 8)), ([-1, 0, -1, 1], (1, 1))):
        assert vision.crop(image, box).size == size, box


class CountingViT(ViT):
    """Counts the pictures and crops that it sees."""

    seen = 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixel_values)
        return super().forward(pixel_values)


@pytest.fixture
def pictures(tmp_path: Path) -> list[tuple]:
    """Three requests: (path, boxes, size)."""
    rng, requests = np.random.default_rng(1), []
    for number, boxes in enumerate(([], [[0, 0, 9, 9]], [[1, 2, 3, 4], [5, 5, 30, 19]])):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(path)
        requests.append((path, boxes, (30, 20)))
    return requests


def test_features_are_the_towers_first_token_of_picture_and_crops(
        pictures: list, tmp_path: Path) -> None:
    """features[k] = ViT(crop k)[0] in float32, boxes beside them."""
    vit = ViT(TINY).eval()
    features, boxes = FeatureCache(vit, "h", tmp_path / "cache").get(*pictures[2])
    image = load_image(pictures[2][0])
    views = [image, image.crop((1, 2, 3, 4)), image.crop((5, 5, 30, 19))]
    expected = vit(torch.stack([preprocess(view, 16) for view in views]))[:, 0]
    torch.testing.assert_close(features, expected.detach(), atol=1e-6, rtol=1e-5)
    assert features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(boxes, normalise_boxes(*pictures[2][1:]))


def test_the_size_of_a_picture_may_be_unknown(pictures: list, tmp_path: Path) -> None:
    """Converted records say null; the boxes are then shares of the picture as it is."""
    cache = FeatureCache(ViT(TINY).eval(), "hash", tmp_path / "cache")
    cache.prepare([(path, boxes, None) for path, boxes, _ in pictures])
    for path, boxes, size in pictures:
        for known, unknown in zip(cache.get(path, boxes, size), cache.get(path, boxes, None)):
            torch.testing.assert_close(known, unknown)
    with pytest.raises(ImageError, match="0.png: box"):
        cache.get(pictures[0][0], [[0, 0, 99, 9]], None)


def test_a_second_run_computes_nothing(pictures: list, tmp_path: Path) -> None:
    """Features are on disk after prepare; another process finds them, whatever the order."""
    vit = CountingViT(TINY)
    cache = FeatureCache(vit, "h", tmp_path / "cache")
    cache.prepare(pictures)
    assert vit.seen == 1 + 2 + 3
    again = FeatureCache(vit, "h", tmp_path / "cache")
    again.prepare(pictures[::-1])
    for request in pictures:
        assert torch.equal(cache.get(*request)[0], again.get(*request)[0])
    assert vit.seen == 6


def test_features_are_computed_again_when_anything_they_depend_on_changes(
        pictures: list, tmp_path: Path) -> None:
    """Content, boxes, preprocessing and the tower's weights; a copied file is the same content."""
    vit, (path, boxes, size) = CountingViT(TINY), pictures[1]
    FeatureCache(vit, "h", tmp_path / "cache").get(path, boxes, size)
    shutil.copy(path, tmp_path / "copy.png")
    FeatureCache(vit, "h", tmp_path / "cache").get(tmp_path / "copy.png", boxes, size)
    assert vit.seen == 2
    FeatureCache(vit, "h", tmp_path / "cache").get(path, [[0, 0, 9, 8]], size)
    FeatureCache(vit, "other", tmp_path / "cache").get(path, boxes, size)
    shutil.copy(pictures[2][0], path)
    FeatureCache(vit, "h", tmp_path / "cache").get(path, boxes, size)
    vit.preprocessing = vit.size, (0.4, 0.4, 0.4), *vit.preprocessing[2:]
    FeatureCache(vit, "h", tmp_path / "cache").get(path, boxes, size)
    assert vit.seen == 2 + 4 * 2


def test_features_of_earlier_versions_are_still_found(tmp_path: Path) -> None:
    """The names of tensors, hashed from content, boxes, size and preprocessing, never change."""
    (tmp_path / "picture").write_bytes(b"any bytes")
    cache, path = FeatureCache(ViT(TINY), "h", tmp_path / "cache"), str(tmp_path / "picture")
    assert cache.name((path, ((0, 0, 4, 4.5),), (8, 9))) == (
        "0a9958a0cb1698ebe2d95acae3a374e2085a2105f2129d994227d64dd97d4dc0")
    assert cache.name((path, (), None)) == (
        "d4f1e40c6bd8001b42601f081cf57fe37f86338c8264348b418413a0d3131f7a")


def test_many_pictures_are_spread_over_shards(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of the tower and files cut across pictures without mixing them up."""
    monkeypatch.setattr(FeatureCache, "SHARD", 4)
    monkeypatch.setattr(FeatureCache, "AHEAD", 3)
    monkeypatch.setattr(FeatureCache, "CROPS", 2)
    requests = []
    for number in range(10):
        Image.new("RGB", (8, 8), (number * 20, 0, 99)).save(tmp_path / f"{number}.png")
        requests.append((tmp_path / f"{number}.png", [[0, 0, 4, 4]] * (number % 3), (8, 8)))
    vit = ViT(TINY)
    cache = FeatureCache(vit, "h", tmp_path / "cache")
    cache.prepare(requests)
    assert len(list((tmp_path / "cache" / "h").glob("*.safetensors"))) == 3
    for path, boxes, size in requests:
        pixels = preprocess(load_image(path), 16)
        expected = vit(pixels[None])[0, :1].detach().expand(1 + len(boxes), -1)  # all one colour
        torch.testing.assert_close(cache.get(path, boxes, size)[0], expected, atol=1e-5, rtol=1e-4)


def test_an_interrupted_write_leaves_no_shard(pictures: list, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are renamed when whole: a crash before that leaves nothing that a reader could meet."""
    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt
    cache = FeatureCache(ViT(TINY), "h", tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        cache.prepare(pictures)
    assert list((tmp_path / "cache" / "h").iterdir()) == []
    assert cache.get(*pictures[0])[0].shape == (1, 12)


def test_a_damaged_shard_is_an_error_that_says_what_to_do(pictures: list, tmp_path: Path) -> None:
    """Truncated or overwritten files of features are named; deleting them is enough."""
    FeatureCache(ViT(TINY), "h", tmp_path / "cache").prepare(pictures)
    (shard,) = (tmp_path / "cache" / "h").glob("*.safetensors")
    for content in (shard.read_bytes()[:-5], b"", b"\xff" * 99):
        shard.write_bytes(content)
        with pytest.raises(ImageError, match=f"{shard.name}.*delete it"):
            FeatureCache(ViT(TINY), "h", tmp_path / "cache").get(*pictures[0])
    shard.unlink()
    FeatureCache(ViT(TINY), "h", tmp_path / "cache").get(*pictures[0])


def test_the_records_size_must_be_the_pictures(pictures: list, tmp_path: Path) -> None:
    """A wrong size would move every box; without a size the picture's own is taken."""
    cache, path = FeatureCache(ViT(TINY), "h", tmp_path / "cache"), pictures[0][0]
    with pytest.raises(ImageError, match="0.png.*expected 20 x 30.*got 30 x 20"):
        cache.get(path, [], (20, 30))
    with pytest.raises(ImageError, match="0.png.*box"):
        cache.get(path, [[0, 0, 99, 9]], (30, 20))
    with pytest.raises(ImageError, match="absent.png"):
        cache.prepare([(tmp_path / "absent.png", [], (3, 3))])
    assert torch.equal(cache.get(path, [], None)[0], cache.get(path, [], (30, 20))[0])


# ------------------------------------------------------------------------------ UMIE

D, WIDTH, OBJECTS = 16, 12, 4


def make_umie(fusion: str = "gate", kind: str = "relu") -> UMIE:
    """A tiny model in eval mode whose gate is awake: last projection not zero, cosines positive."""
    t5 = T5(T5Config(vocab_size=40, d_model=D, d_kv=6, d_ff=24, num_layers=2, num_heads=3,
                     feed_forward_proj=kind))
    model = UMIE(t5, WIDTH, OBJECTS, fusion)
    if fusion == "gate":
        torch.nn.init.normal_(model.fusion.feed_forward.down.weight)
        model.fusion.cosine = lambda *inputs: GateFusion.cosine(model.fusion, *inputs).abs()
    return model.eval()


def make_batch(B: int = 3, S: int = 7, V: int = 4, T: int = 5) -> SimpleNamespace:
    """Random rows: row 0 is full, row 1 is padded in text and objects, row 2 has no image."""
    mask = torch.ones(B, S, dtype=torch.bool)
    visual = torch.ones(B, V, dtype=torch.bool)
    labels = torch.randint(2, 40, (B, T))
    if B == 3:
        mask[1, 4:], visual[1, 2:], visual[2], labels[1, 3:] = False, False, False, -100
    return SimpleNamespace(input_ids=torch.randint(2, 40, (B, S)) * mask, attention_mask=mask,
                           labels=labels, tasks=torch.tensor([0, 1, 2])[:B], visual_mask=visual,
                           features=torch.randn(B, V, WIDTH) * visual[..., None],
                           boxes=torch.rand(B, V, 5) * visual[..., None])


def row(batch: SimpleNamespace, index: int, S: int, V: int, T: int) -> SimpleNamespace:
    """One row alone, cut to its real tokens."""
    cuts = {"input_ids": S, "attention_mask": S, "labels": T, "features": V, "boxes": V,
            "visual_mask": V}
    return SimpleNamespace(tasks=batch.tasks[index:index + 1], **{
        name: getattr(batch, name)[index:index + 1, :length] for name, length in cuts.items()})


def test_the_pretrained_t5_is_intact_at_the_start() -> None:
    """The gate's last projection is zero: the logits are those of T5 alone, to the bit."""
    model, batch = make_umie(), make_batch()
    torch.nn.init.zeros_(model.fusion.feed_forward.down.weight)
    logits, _ = model.t5(batch.input_ids, batch.attention_mask, batch.labels)
    assert torch.equal(model(batch), logits)
    fresh = UMIE(model.t5, WIDTH, OBJECTS)
    assert not fresh.fusion.feed_forward.down.weight.any()


def test_a_row_without_image_passes_the_gate_unchanged() -> None:
    """No visual token: h' = h to the bit; rows with an image do change."""
    model, batch = make_umie(), make_batch()
    h = model.t5.encode(batch.input_ids, batch.attention_mask)
    memory, mask = model.encode(batch)
    assert torch.equal(memory[2], h[2]) and torch.equal(mask, batch.attention_mask)
    assert (memory[:2] - h[:2]).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("fusion", ["gate", "concat"])
def test_a_row_does_not_depend_on_neighbours_or_padding(fusion: str) -> None:
    """Each row alone, without padding, gives the logits it has in the batch, within 1e-5."""
    model, batch = make_umie(fusion), make_batch()
    together = model(batch)
    for index, (S, V, T) in enumerate(((7, 4, 5), (4, 2, 3), (7, 0, 5))):
        alone = model(row(batch, index, S, V, T))
        torch.testing.assert_close(together[index, :T], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["gate", "concat"])
def test_what_lies_under_a_mask_does_not_matter(fusion: str) -> None:
    """Features and boxes of padding tokens, and of rows without image, are never read."""
    model, batch = make_umie(fusion), make_batch()
    before = model(batch)
    batch.features = torch.where(batch.visual_mask[..., None], batch.features, 50.0)
    batch.boxes = torch.where(batch.visual_mask[..., None], batch.boxes, -3.0)
    torch.testing.assert_close(model(batch), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["gate", "concat"])
@pytest.mark.parametrize("images", ["some", "none", "no columns"])
def test_batches_with_few_or_no_images_train_without_nan(fusion: str, images: str) -> None:
    """Attention over an empty set is where NaN would come from, forward and backward."""
    model, batch = make_umie(fusion).train(), make_batch(V=0 if images == "no columns" else 4)
    if images == "none":
        batch.visual_mask[:] = False
    logits = model(batch)
    F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert logits.isfinite().all() and all(g.isfinite().all() for g in grads)
    if fusion == "gate" and images != "some":
        visual = [*model.vstack.parameters(), *model.fusion.parameters()]
        assert not any(p.grad is not None and p.grad.any() for p in visual)


def test_the_gate_is_the_doubly_rectified_cosine_of_projected_means() -> None:
    """lambda = leaky(leaky(exp(0.5) cos(mean W_t h, mean W_v visual))), token by token by hand."""
    fusion = GateFusion(make_umie().t5.config)
    h, visual = torch.randn(3, 5, D), torch.randn(3, 4, D)
    mask, visual_mask = torch.ones(3, 5).bool(), torch.ones(3, 4).bool()
    mask[1, 2:], visual_mask[1, 1:] = False, False
    found = fusion.gate(h, mask, visual, visual_mask)
    for i in range(3):
        text = torch.stack([fusion.proj_text(t) for t in h[i][mask[i]]]).mean(0)
        seen = torch.stack([fusion.proj_visual(t) for t in visual[i][visual_mask[i]]]).mean(0)
        cosine = (text @ seen / (text.norm() * seen.norm())).item()
        x = math.exp(0.5) * cosine
        expected = x if x > 0 else 0.01 * 0.01 * x
        assert found[i].item() == pytest.approx(expected, abs=1e-6)
    shapes = [tuple(m.weight.shape) for m in fusion.proj_text]
    assert shapes == [(384, D), (128, 384)] and all(m.bias is None for m in fusion.proj_visual)


def test_the_gate_can_be_opened_before_training() -> None:
    """Below 0 the gate is 1e4 times weaker and stays so; the sign of a fresh projection is free."""
    for seed in range(6):
        torch.manual_seed(seed)
        model, batch = UMIE(make_umie().t5, WIDTH, OBJECTS).eval(), make_batch()
        before, seen = model.fusion.proj_visual[1].weight.clone(), []
        model.open_gate(batch)
        assert torch.equal(model.fusion.proj_visual[1].weight.abs(), before.abs())
        model.fusion.register_forward_pre_hook(lambda _, given: seen.append(given))
        model.encode(batch)
        assert model.fusion.cosine(*seen[0])[:2].mean() > 0
    model.open_gate(make_batch(V=0))  # without images there is nothing to do


def test_the_gate_fuses_as_defined() -> None:
    """h' = h + lambda FF(LN(h + CrossAttn(LN h, visual))), the attention written out."""
    fusion = make_umie(kind="relu").fusion
    h, visual = torch.randn(2, 5, D), torch.randn(2, 3, D)
    mask, visual_mask = torch.ones(2, 5).bool(), torch.tensor([[True] * 3, [True, False, False]])

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    heads = [(p(x).unflatten(-1, (3, 6)).transpose(1, 2)) for p, x in (
        (fusion.attention.q, norm(h, fusion.attention_norm.weight)), (fusion.attention.k, visual),
        (fusion.attention.v, visual))]
    scores = heads[0] @ heads[1].transpose(-1, -2)
    weights = scores.masked_fill(~visual_mask[:, None, None], -math.inf).softmax(-1)
    a = h + fusion.attention.o((weights @ heads[2]).transpose(1, 2).flatten(2))
    x, ff = norm(a, fusion.feed_forward_norm.weight), fusion.feed_forward
    f = ff.down(F.gelu(ff.gate(x), approximate="tanh") * ff.up(x))  # gated even beside a relu T5
    expected = h + fusion.gate(h, mask, visual, visual_mask)[:, None, None] * f
    torch.testing.assert_close(fusion(h, mask, visual, visual_mask), expected, atol=1e-5, rtol=1e-4)


def test_the_gradients_of_the_fusion_are_exact() -> None:
    """Finite differences in float64, padding and a row without visual tokens included."""
    fusion = make_umie().double().fusion
    h = torch.randn(3, 2, D, dtype=torch.float64, requires_grad=True)
    visual = torch.randn(3, 2, D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    visual_mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert torch.autograd.gradcheck(lambda a, b: fusion(a, mask, b, visual_mask), (h, visual),
                                    atol=1e-6)


def test_the_policies_free_what_they_say_of_the_adapter() -> None:
    """train: all but T5; paper: the visual embedding alone; frozen: nothing."""
    model = make_umie().requires_grad_(False)
    for policy, children in (("frozen", set()), ("paper", {"visual_embedding"}),
                             ("train", {"visual_embedding", "vstack", "fusion"})):
        model.free_adapter(policy)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name.split(".")[0] in children)


def test_a_visual_token_is_the_sum_of_feature_box_and_order() -> None:
    """LN(Linear(feature)) + LN(Linear(x1, y1, x2, y2, area)) + order[k], norms of scale 1."""
    embedding = make_umie().visual_embedding
    features, boxes = torch.randn(2, 3, WIDTH), torch.rand(2, 3, 5)
    parts = [layer(x) for layer, x in ((embedding.feature, features), (embedding.box, boxes))]
    expected = sum(x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) for x in parts)
    expected = expected + embedding.order.weight[:3]
    torch.testing.assert_close(embedding(features, boxes), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ImageError, match=f"{OBJECTS} objects, got {OBJECTS + 2}"):
        embedding(torch.randn(1, OBJECTS + 2, WIDTH), torch.rand(1, OBJECTS + 2, 5))


def test_concat_puts_visual_tokens_before_the_text() -> None:
    """Memory = encoder([VStack(visual); text]); without images it is plain T5."""
    model, batch = make_umie("concat"), make_batch()
    memory, mask = model.encode(batch)
    assert memory.shape == (3, 4 + 7, D)
    front = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()  # padding goes first
    assert torch.equal(mask, torch.cat([front, batch.attention_mask], 1))
    assert not any("fusion" in name for name in model.state_dict())
    h = model.t5.encode(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(memory[2, 4:], h[2], atol=1e-5, rtol=1e-5)
    assert (memory[0, 4:] - h[0]).abs().max() > 1e-3


class Recorder:
    """Stands where the expert layers' routing object will stand."""

    def __init__(self) -> None:
        self.calls, self.indices = [], []

    def set(self, tasks: torch.Tensor, memory: torch.Tensor, target: torch.Tensor | None,
            visual: torch.Tensor) -> None:
        self.calls.append((tasks, memory, target, visual))

    def rows(self, index: torch.Tensor) -> None:
        self.indices.append(index)


@pytest.mark.parametrize("fusion", ["gate", "concat"])
def test_the_routing_object_is_told_tasks_and_masks(fusion: str) -> None:
    """set(tasks, memory [B,M], target [B,T] or None, visual [B,V]) once per encode, all bool."""
    model, batch = make_umie(fusion), make_batch()
    model.routing = Recorder()
    model(batch)
    tasks, memory, target, visual = model.routing.calls.pop()
    whole = torch.cat([batch.visual_mask.flip(1), batch.attention_mask], 1)
    assert torch.equal(tasks, batch.tasks) and torch.equal(visual, batch.visual_mask)
    assert torch.equal(memory, batch.attention_mask if fusion == "gate" else whole)
    assert torch.equal(target, batch.labels != -100) and memory.dtype == torch.bool
    batch.labels = None
    model.generate(batch, 3, num_beams=2)
    assert len(model.routing.calls) == 1 and model.routing.calls[0][2] is None
    assert model.routing.indices[0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("fusion", ["gate", "concat"])
def test_generation_continues_what_forward_scores(fusion: str) -> None:
    """Greedy ids are the argmax of forward's logits step by step; a row is the same alone."""
    model, batch = make_umie(fusion), make_batch()
    ids = model.generate(batch, 6, banned_ids=[1, 7])
    batch.labels = ids
    logits = model(batch)
    logits[..., [1, 7]] = -math.inf
    assert torch.equal(logits.argmax(-1), ids) and ids.shape == (3, 6)
    assert torch.equal(model.generate(row(batch, 1, 4, 2, 6), 6, banned_ids=[1, 7])[0], ids[1])


def test_the_expert_layers_paths_do_not_reach_the_gate() -> None:
    """Attention of T5 and VStack is found by its path, the gate's must not be."""
    names = [name for name, _ in make_umie().named_modules() if name.endswith(".q")]
    inside = [n for n in names if set(n.split(".")) & {"encoder", "decoder", "vstack"}]
    assert set(names) - set(inside) == {"fusion.attention.q"}
    assert sum(n.startswith("vstack.blocks.") for n in names) == 2


def test_parameters_can_be_counted_without_memory() -> None:
    """On the meta device: the visual adapter of the base size for 768-wide features."""
    with torch.device("meta"):
        config = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12,
                          num_heads=12, feed_forward_proj="gated-gelu", tie_head=False)
        model = UMIE(T5(config), 768, 16)
    count = {name: sum(p.numel() for p in child.parameters())
             for name, child in model.named_children() if child is not None}
    assert count["visual_embedding"] == 768 * 768 + 5 * 768 + 4 * 768 + 17 * 768
    assert count["vstack"] == 2 * (4 * 768 ** 2 + 3 * 768 * 2048 + 2 * 768) + 768 + 32 * 12
    assert count["fusion"] == 4 * 768 ** 2 + 3 * 768 * 2048 + 2 * 768 + 2 * (768 * 384 + 384 * 128)


def test_an_unknown_fusion_is_an_error() -> None:
    """gate and concat are the two that exist."""
    with pytest.raises(ValueError, match="gate or concat"):
        make_umie("sum")
