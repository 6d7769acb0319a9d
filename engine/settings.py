"""The settings of a run, and the command line that sets them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from timeit import timeit

import torch

from engine.command import Parser
from engine.files import UsageError, note
from engine.schema import TASKS, UNITS

VIT = "google/vit-base-patch16-224-in21k"
IMPLS = ("auto", "plain", "fast", "cuda")  # --impl: forms of the expert layers
MEANS = ("identity", "affine", "map")  # --mim-mean: readings of the student's mean in L_MIM
CACHE = "folder for image features; default: .features in the corpus, else in your cache folder"


def old_spelling(impl: str) -> str:
    """A value of --impl, as it is spelt now: "reference" is "fast", which is said once."""
    if impl == "reference":
        note("--impl reference is now called fast")
    return "fast" if impl == "reference" else impl


@cache
def slow_bf16() -> float | None:
    """How many times as long as in fp32 a product takes in bf16 on this CPU; None if not twice.
    With instructions for bf16 it is 0.3 to 1, without them 3 to 60.  One thread measures in some
    10 ms, and the least of six counts: what else runs here shall not decide."""
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.ones(n, 768, dtype=dtype, device="cpu") for n in (128, 768))
        seconds.append(min(timeit(lambda: torch.nn.functional.linear(x, w), number=1)
                           for _ in range(6)))
    torch.set_num_threads(threads)
    return factor if (factor := seconds[1] / seconds[0]) > 2 else None


def computed_in(precision: str) -> str:
    """The precision in which this machine computes what should be in `precision`: fp32 for bf16
    where there is no GPU and bf16 is slow, which is said once."""
    if precision == "bf16" and not torch.cuda.is_available() and (factor := slow_bf16()):
        note(f"bf16 takes {factor:.0f} times as long as fp32 on this CPU (measured), so "
             "fp32 is computed in place of it")
        return "fp32"
    return precision


# Defaults that come with a backbone.  t5, vit: names on the hub, None for what demo.py makes;
# batch: rows of a global batch (paper: 10, 4, 2 a GPU on 4 GPUs); decoded: rows decoded together.
Size = make_dataclass("Size", ("t5", "vit", "rank", "batch", "micro_batch", "epochs", "lr",
                               "lr_epochs", "dropout", "max_target", "decoded"), frozen=True)
SIZES = {"tiny": Size(None, None, 24, 32, 32, 3, 1e-3, 2, 0.0, 40, 128),
         "base": Size("google/flan-t5-base", VIT, 128, 40, 10, 20, 1e-4, 5, 0.1, 192, 32),
         "large": Size("google/flan-t5-large", VIT, 64, 16, 4, 20, 1e-4, 5, 0.1, 192, 32),
         "xl": Size("google/flan-t5-xl", VIT, 64, 8, 2, 20, 1e-4, 5, 0.1, 192, 32)}


def option(default: object, text: str, convert: Callable = str, **more: object) -> object:
    """A field that is also a command-line option, with this help text and `more` for argparse.
    convert: makes the value from a word; bool has no word but a --no- form."""
    reads = {"action": argparse.BooleanOptionalAction} if convert is bool else {"type": convert}
    return field(default=default, metadata={"help": text, **reads, **more})


# What a number must be: in words, as a test, and the fields of Config that it holds for.
BOUNDS = (
    (f"at least {len(TASKS)}", lambda n: n >= len(TASKS), ("rank",)),
    ("at least 2", lambda n: n >= 2, ("max_source", "max_target")),
    ("at least 1", lambda n: n >= 1,
     ("epochs", "steps", "batch", "micro_batch", "lr_epochs", "save_every")),
    ("at least 0", lambda n: n >= 0, ("max_objects", "backbone_steps", "beta", "aml_gamma")),
    ("above 0", lambda n: n > 0, ("lr", "clip", "aml_margin", "aml_temperature")),
    ("in [0, 1)", lambda n: 0 <= n < 1, ("dropout", "backbone_dropout")))


@dataclass
class Config:
    """Everything that decides what a run computes.  It is stored in checkpoints."""
    size: str = option("tiny", "backbone size", choices=tuple(SIZES))
    method: str = option("clorae", "what is trained")
    egr: bool = option(True, "gate router between the experts, Eq. (6)", bool)
    mim: bool = option(True, "mutual-information loss, Eq. (5)", bool)
    data: str | None = option(None, "corpus folder (see python -m tools.convert); default: the "
                              "demo world", metavar="DIR")
    units: list[str] | None = option(None, "train on these units only (" + ", ".join(UNITS)
                                     + "); default: all", nargs="+", choices=UNITS, metavar="UNIT")
    hold_out: str = option("none", "Table 4: never train on T17 and V2; 'clean' leaves out SNAP "
                           "and every training text of their test splits as well",
                           choices=("none", "paper", "clean"))
    missing_images: str = option("error", "'mask': rows whose image is missing train without one",
                                 choices=("error", "mask"))
    max_source: int = option(256, "source tokens; only the text part is cut", int)
    max_target: int | None = option(None, "target tokens; default: by size", int)
    max_objects: int = option(16, "object crops used per image", int)
    t5: str | None = option(None, "T5 folder; default: the size's own", metavar="DIR")
    vit: str | None = option(None, "ViT or CLIP folder; default: the size's own", metavar="DIR")
    backbone_steps: int | None = option(None, "make a tiny T5 in so many steps; default: the "
                                        "demo's own is taken, for other data 1500 steps", int)
    rank: int | None = option(None, "universal rank R; default: by size", int)
    alpha: float | None = option(None, "numerator of the scale, Eq. (8); default: 2 R", float)
    dropout: float | None = option(None, "dropout on the experts' input; default: by size", float)
    visual_policy: str = option("train", "'train' the visual adapter in full; 'paper': of it only "
                                "the visual embedding; 'frozen': nothing of it (both need --init)",
                                choices=("train", "paper", "frozen"))
    init: str | None = option(None, "begin with the weights of this run of method full, which "
                              "holds a trained visual adapter; default: fresh ones", metavar="RUN")
    backbone_dropout: float | None = option(None, "dropout of T5 and the visual adapter; "
                                            "default: T5's own", float)
    fusion: str = option("gate", "how visual tokens meet the text", choices=("gate", "concat"))
    epochs: int | None = option(None, "epochs; default: by size", int)
    steps: int | None = option(None, "optimizer steps to stop after; default: by --epochs", int)
    batch: int | None = option(None, "global batch size; default: by size", int)
    micro_batch: int | None = option(None, "mean rows per forward pass; default: by size", int)
    lr: float | None = option(None, "Adam's learning rate; default: by size", float)
    lr_epochs: int | None = option(None, "epochs until the rate is halved; default: by size", int)
    clip: float = option(1.0, "largest gradient norm", float)
    aml: bool | None = option(None, "achievement weights, Eq. (9); default: clorae only", bool)
    beta: float = option(0.01, "weight of the mutual-information loss, Eq. (10)", float)
    mim_mean: str = option("identity", "mean of the student's Gaussian, Eq. (5): the task expert's "
                           "output D, 'affine' a D + c for each channel, or 'map' B_U M z_D from "
                           "its codes", choices=MEANS)
    aml_margin: float = option(1.05, "margin above the reference F1, Eq. (9)", float)
    aml_gamma: float = option(2.0, "exponent, Eq. (9)", float)
    aml_temperature: float = option(1.0, "temperature of the softmax over Eq. (9)", float)
    aml_reference: str | None = option(None, "JSON file {unit: reference F1}, p_m of Eq. (9); "
                                       "default: the demo's own, or the paper's", metavar="FILE")
    out: str | None = option(None, "run folder; default: runs/DATA-SIZE-METHOD", metavar="DIR")
    save_every: int = option(200, "optimizer steps between checkpoints", int)
    seed: int = option(0, "seed of initialisation, order and dropout", int)
    precision: str | None = option(None, "computation; default: bf16 on CUDA, fp32 elsewhere, and "
                                   "instead of bf16 on a CPU that is slow in it (fp16 overflows in "
                                   "T5: t5.compute_dtype refuses it)",
                                   choices=("fp32", "bf16"))
    impl: str = option("auto", "expert layers as the paper writes them ('plain'), in rank space "
                       "('fast') or on clorae.cu ('cuda'); 'auto': the fastest that works",
                       old_spelling, choices=IMPLS)
    graphs: bool = option(False, "on a GPU, launch all kernels of a micro-batch at once, as a CUDA "
                          "graph for each of its shapes: for GPUs that wait for their host; takes "
                          "up to twice the memory of activations", bool)
    checkpoint_activations: bool = option(False, "keep only each block's input and compute the "
                                          "rest again: less memory, about a third more time", bool)

    def resolved(self) -> "Config":
        """The same with every default that depends on another field filled in."""
        filled = {name: value for name, value in vars(SIZES[self.size]).items()
                  if name not in ("t5", "vit", "decoded") and getattr(self, name) is None}
        if self.aml is None:
            filled["aml"] = self.method == "clorae"
        if self.precision is None:
            filled["precision"] = "bf16" if torch.cuda.is_available() else "fp32"
        if self.out is None:
            name = Path(self.data).resolve().name if self.data else "demo"
            filled["out"] = f"runs/{name}-{self.size}-{self.method}"
        return replace(self, **filled)

    def check(self) -> None:
        """UsageError if a number cannot work, before anything slow has begun."""
        bad = [f"--{name.replace('_', '-')} {words}, got {value}"
               for words, holds, names in BOUNDS for name in names
               if (value := getattr(self, name)) is not None and not holds(value)]
        if self.visual_policy != "train" and (self.init is None or self.method == "full"):
            bad.append("--visual-policy other than train with --init RUN (a run of method full) "
                       f"and a method with experts, got --init {self.init}, --method "
                       f"{self.method}: a fresh adapter that is not trained shows nothing")
        if self.method != "clorae" and not (self.egr and self.mim):
            bad.append(f"--no-egr and --no-mim with --method clorae, got --method {self.method}")
        if self.mim_mean != "identity" and not self.uses_mim:
            bad.append("--mim-mean other than identity with --method clorae, --mim and a --beta "
                       f"above 0, got {self.mim_mean} in a run without that loss")
        if bad:
            raise UsageError(f"expected {'; '.join(bad)}; correct the command line")

    # Whether L_MIM, Eq. (5), takes part in the loss.
    uses_mim = property(lambda self: self.method == "clorae" and self.mim and self.beta > 0)


# The option groups of --help: each begins with the field named here.
GROUPS = {"size": "what to train", "data": "data", "t5": "model", "epochs": "optimisation",
          "aml": "losses", "out": "run"}


@dataclass(frozen=True)
class Launch:
    """What one start of a run needs besides its Config.  Nothing here changes what is computed."""
    resume: str = option("auto", "'auto' goes on with the newest checkpoint of --out, 'none' "
                         "starts over, a path names a checkpoint")
    allow_world_change: bool = option(False, "resume with another number of processes: the same "
                                      "batches, equal but for rounding", bool, action="store_true")
    timeout: float = option(300.0, "seconds that the processes wait for one that does not answer",
                            float)
    cache: str | None = option(None, CACHE, metavar="DIR")
    dry_run: bool = option(False, "find, make or fetch corpus and backbone, print files, "
                           "parameters, rows, steps and memory, and stop: no weight is loaded, "
                           "nothing is written to --out", bool, action="store_true")


def parse_arguments(argv: Sequence[str] | None, description: str = "",
                    methods: Sequence[str] | None = None) -> tuple[Config, Launch]:
    """The command line: one option per field of Config and of Launch.  methods: the values of
    --method; without them any word is taken.  UsageError for a number that cannot work."""
    parser = Parser(description=description, usage="%(prog)s [options]")
    for spec in fields(Config) + fields(Launch):
        if spec.name in GROUPS:
            group = parser.add_argument_group(GROUPS[spec.name])
        group.add_argument("--" + spec.name.replace("_", "-"), default=spec.default,
                           **spec.metadata, **{"choices": methods} if spec.name == "method" else {})
    values = vars(parser.parse_args(argv))
    launch = Launch(**{spec.name: values.pop(spec.name) for spec in fields(Launch)})
    config = Config(**values).resolved()
    config.check()
    config.precision = computed_in(config.precision)
    if not launch.timeout > 0:
        raise UsageError(f"expected --timeout above 0, got {launch.timeout}; correct it")
    return config, launch


# How answers are decoded, where a command has any decoded.
DECODING = ("beams", "batch_size", "weights", "impl", "graphs")


def run_options(result: Parser, several: bool = False, required: bool = True,
                without: Sequence[str] = ()) -> None:
    """The options that say which checkpoint is loaded, on which data, and how it decodes.
    without: those that would do nothing in a command; it has them at their defaults, unlisted."""
    def group(title: str) -> Callable:
        listed = result.add_argument_group(title).add_argument

        def add(flag: str, **given: object) -> None:
            name = flag.removeprefix("--").replace("-", "_")
            if name in without:
                result.set_defaults(**{name: given.get("default")})
            else:
                listed(flag, **given)
        return add

    add = group("what to evaluate")
    more = "; several are set side by side, a row per system, which is the runs that differ in " \
           "nothing but their seed" if several else ""
    add("checkpoint", type=Path, metavar="CKPT", nargs="+" if several else 1 if required else "*",
        help="run folder (its best checkpoint is used, the newest where no epoch has ended) or "
             "checkpoint folder" + more)
    add("--split", choices=("test", "dev", "train"), default="test", help="which records")
    add("--data", metavar="DIR", help="corpus folder; default: the one trained on")
    for flag, name in (("t5", "T5"), ("vit", "ViT"), ("init", "full run below the experts")):
        add(f"--{flag}", metavar="DIR", help=f"folder of the {name} that CKPT was trained on, "
            "where it is no longer at its place; sha256 must agree")
    add("--cache", metavar="DIR", help=CACHE)
    add("--units", nargs="+", choices=UNITS, metavar="UNIT",
        help=f"only these columns ({' '.join(UNITS)}); default: all in the corpus")
    add("--missing-images", choices=("error", "mask"),
        help="mask: rows whose image file is missing are answered without it, and counted; "
             "default: as in training")
    add = group("decoding")
    add("--beams", type=positive, default=1, metavar="N",
        help="beam search over N beams; 1 is greedy")
    add("--batch-size", type=positive, metavar="N",
        help=f"rows decoded together; default: 32, of the tiny size {SIZES['tiny'].decoded}")
    add("--weights", choices=("stored", "int8"), default="stored",
        help="int8: on a CPU, decode with the matrices of T5 and its experts in 8 bits: faster, "
             "but some answers change")
    add("--impl", type=old_spelling, choices=IMPLS,
        help="the modules of the chapters (plain), their faster forms (fast), these with clorae.cu "
             "(cuda); default: auto, the fastest that works here")
    add("--graphs", action=argparse.BooleanOptionalAction,
        help="on a GPU, launch all kernels of a token at once, as a CUDA graph; default: as the "
             "run that trained CKPT")


def positive(word: str) -> int:
    """A whole number of at least 1, from the command line."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {word}")
    return int(word)
