"""Parameters and FLOPs of every method, as in Table 5, counted, not measured: of flan-t5-SIZE, or
with CKPT of its backbone at its rows' mean lengths.

    python -m tools.costs --size large
    python -m tools.costs RUN"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import clorae
from data import Example
from engine.command import Parser, aligned
from engine.files import UsageError
from engine.processes import World, carry_out
from engine.schema import TASKS
from engine.settings import DECODING, SIZES
from evaluate import Job, Setup, run_options
from t5 import T5, Attention, RMSNorm, T5Config
from vision import UMIE, ViT

# flan-t5: model width D, feed-forward width, layers of the encoder and of the decoder, heads
GEOMETRY = {"base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32)}
# method as it is printed: options of clorae.adapt
COSTED = {"full": {}, "lora": {}, "moslora": {}, "loramoe": {}, "hydralora": {}, "mtllora": {},
          "clorae": {}, "tlora": {}, "clorae --no-egr": {"egr": False},
          "clorae --no-mim": {"mim": False}, "clorae --mim-mean affine": {"mim_mean": "affine"},
          "clorae --mim-mean map": {"mim_mean": "map"}}
VISUAL_POLICIES = ("frozen", "paper", "train")  # of Config, each adding to the one before
# Table 5 (arXiv 2505.06303v1, HTML): TP in millions, GFLOPs of fwd and of fwd + bwd.
PAPER_COSTS = {
    "base": {"full": (287.0, 21.3, 63.8), "lora": (15.5, 22.0, 65.9), "moslora": (15.8, 26.3, 78.9),
             "loramoe": (30.5, 22.7, 68.2), "clorae": (30.4, 23.2, 69.5)},
    "large": {"full": (843.0, 73.2, 219.0), "lora": (20.3, 74.1, 223.4),
              "moslora": (20.4, 89.1, 267.3), "loramoe": (40.0, 75.2, 225.5),
              "clorae": (39.9, 75.7, 227.2)}}
PAPER_LENGTHS = (95, 1, 21)  # source, target, visual tokens that reproduce its figures of "full"
UMIE_FEATURES = 512  # F in UMIE


def passing(path: str) -> str:
    """The token stream that passes through a module of a UMIE: "memory", "target" or "visual"."""
    names = path.split(".")
    if names[0] == "visual_embedding" or names[0] == "fusion" and names[-1] in ("k", "v"):
        return "visual"
    return clorae.stream_of(path)


class FlopCounter:
    """FLOPs of one row of a UMIE: 2 per multiply-add of a matrix product, the rest is free.

    `backward` has one product for each gradient that is formed: that of a weight if it is trained,
    that of a linear's input if something below is trained.  `live` says of each token stream
    whether its hidden states need a gradient so far; so the walk follows the forward pass.  Experts
    count in rank space, one task of N, and MTL-LoRA's B as one, since it mixes them once a batch.
    `trainable` is what clorae.parameter_split says."""

    def __init__(self, model: nn.Module, source: float, target: float, visual: float):
        self.trainable = clorae.parameter_split(model)
        embedded = model.t5.shared.weight.requires_grad
        self.tokens = {"memory": source, "target": target, "visual": visual}
        self.live = {"memory": embedded, "target": embedded, "visual": False}
        self.forward = self.backward = 0.0
        if visual:
            self.walk("visual_embedding", model.visual_embedding)
            self.walk("vstack", model.vstack)
            if model.fusion is None:
                self.tokens["memory"] += visual
                self.live["memory"] |= self.live["visual"]
        self.walk("encoder", model.t5.encoder)
        if visual and model.fusion is not None:
            self.walk("fusion", model.fusion)
        self.walk("decoder", model.t5.decoder)
        self.linear(model.t5.lm_head or model.t5.shared, target, self.live["target"])

    def walk(self, path: str, module: nn.Module) -> None:
        """Count what lies below a module, and note whether its stream is live behind it."""
        stream = passing(path)
        if isinstance(module, Attention):
            self.attention(path, module)
        elif isinstance(module, nn.Linear):
            tokens = 1 if path.startswith("fusion.proj_") else self.tokens[stream]  # reads a mean
            live = self.live[stream] and not path.startswith("visual_embedding")  # reads data
            self.live[stream] |= self.linear(module, tokens, live)
        elif isinstance(module, (RMSNorm, nn.Embedding)):
            self.live[stream] |= module.weight.requires_grad
        else:
            for name, child in module.named_children():
                self.walk(f"{path}.{name}", child)

    def attention(self, path: str, module: Attention) -> None:
        """q, k, v, o, and two products per head of forward: scores, and their mix of values."""
        query, source = passing(path + ".q"), passing(path + ".k")
        q, k, v = (self.linear(linear, self.tokens[stream], self.live[stream]) for linear, stream
                   in ((module.q, query), (module.k, source), (module.v, source)))
        product = 2 * module.o.in_features * self.tokens[query] * self.tokens[source]
        self.forward += 2 * product
        self.backward += product * (q + k + v + (q or k))  # dQ, dK, dV, and dScores for either
        self.live[query] |= self.linear(module.o, self.tokens[query], q or k or v)

    def linear(self, module: nn.Module, tokens: float, live: bool) -> bool:
        """Count one linear with its experts; returns whether its output needs a gradient."""
        for name, weight in module.named_parameters():
            leaf = name.split(".")[-1]
            if weight.dim() > 1 and leaf not in ("w_T", "M_D"):  # which no token is multiplied by
                single = leaf in ("A_T", "B_T", "L_T") or leaf == "B_E" and hasattr(module, "w_T")
                product = 2 * tokens * weight.numel() / (len(weight) if single else 1)
                below = live or leaf.startswith(("B", "M", "L"))  # their input: from a trained A
                self.forward += product
                self.backward += product * (weight.requires_grad + below)
        return live or any(weight.requires_grad for weight in module.parameters())


def mim_flops(model: nn.Module, lengths: Sequence[float]) -> tuple[float, float]:
    """FLOPs that L_MIM, Eq. (5), in rank space adds to a training step, forward and backward: once
    for all rows of one task, and for each row of these (source, target, visual) tokens."""
    tokens = dict(zip(("memory", "target", "visual"), lengths))
    once = row = 0.0
    for layer in clorae.expert_layers(model).values():
        if hasattr(layer, "rho"):
            R, r = layer.B_U.shape[1], layer.B_T.shape[2]
            work = 4 * R * R + 4 * R * r + 6 * r * r  # for a token, or for a channel of the output
            once, row = once + work * len(layer.rho), row + work * tokens[layer.stream]
    return once, row


@dataclass(frozen=True)
class Geometry:
    """What the cost of a method depends on besides the method."""
    name: str
    t5: T5Config
    rank: int
    features: int  # F
    objects: int  # most object tokens of a row
    lengths: tuple[float, float, float]  # source, target, visual tokens of a row
    fusion: str = "gate"

    @classmethod
    def of_size(cls, size: str, rank: int, lengths: Sequence[int]) -> "Geometry":
        """flan-t5-SIZE with UMIE's image features."""
        if min(lengths[:2]) < 1 or lengths[2] < 0:
            raise UsageError("--lengths: expected source and target tokens, and visual ones "
                             f"or 0, got {' '.join(map(str, lengths))}; correct them")
        width, *others = GEOMETRY[size]
        t5 = T5Config(32128, width, 64, *others, feed_forward_proj="gated-gelu", tie_head=False,
                      scale_logits=False)
        return cls(f"flan-t5-{size}", t5, rank, UMIE_FEATURES, max(16, lengths[2] - 1),
                   tuple(lengths))

    @classmethod
    def of_run(cls, setup: Setup, examples: Sequence[Example]) -> "Geometry":
        """A run's own backbone, fusion and rank, at the mean lengths of these rows."""
        config, tasks = setup.config, len(TASKS)
        if config.rank < tasks:
            raise UsageError(f"CKPT: expected a run of rank {tasks} or more, one for each task "
                             f"expert of the methods it is compared with, got rank {config.rank}; "
                             "name another run, or --size instead of one")
        tokens = [(len(e.input_ids), len(e.labels), bool(e.record.image) * (
            1 + min(len(e.record.objects), config.max_objects))) for e in examples]
        lengths = tuple(sum(column) / len(column) for column in zip(*tokens or [(0, 0, 0)]))
        return cls("this run", setup.model.t5.config, config.rank,
                   ViT.feature_width(setup.sources.vit), config.max_objects, lengths, config.fusion)

    def model(self, method: str, **options: object) -> nn.Module:
        """The adapted model, on the meta device: without memory for its weights."""
        with torch.device("meta"):
            model = UMIE(T5(self.t5), self.features, self.objects, self.fusion)
        return clorae.adapt(model, method, self.rank, TASKS, **options)

    def forward(self, method: str) -> float:
        """GFLOPs of a forward pass."""
        return FlopCounter(self.model(method), *self.lengths).forward / 1e9


Costs = dict[str, dict[str, FlopCounter]]  # {method of COSTED: {visual policy: cost of one row}}


def costs(geometry: Geometry) -> Costs:
    """The costs of every method under every visual policy."""
    table: Costs = {}
    for label, options in COSTED.items():
        model, table[label] = geometry.model(label.split()[0], **options), {}
        for policy in VISUAL_POLICIES:
            model.free_adapter(policy)
            table[label][policy] = FlopCounter(model, *geometry.lengths)
    return table


def cost_tables(table: Costs, paper: Mapping[str, tuple]) -> list[str]:
    """Trainable parameters and GFLOPs of every method, beside the paper's where it has them."""
    groups, policies = ("experts", "gate", "mim", "backbone"), VISUAL_POLICIES
    millions = [["trainable, M", *groups, *(f"visual:{p}" for p in policies),
                 *(f"all:{p}" for p in policies), "paper"]]
    gflops = [["GFLOPs", "fwd", "3 fwd", *(f"fwd+bwd:{p}" for p in policies), "paper fwd",
               "paper fwd+bwd"]]
    for label, costs_of in table.items():
        splits, forward = [costs_of[p].trainable for p in policies], costs_of["train"].forward
        counts = [*(splits[0][name] for name in groups), *(split["visual"] for split in splits),
                  *(sum(split.values()) for split in splits)]
        work = [forward, 3 * forward, *(forward + costs_of[p].backward for p in policies)]
        published, *rates = map(str, paper.get(label, "---"))
        millions.append([label, *(f"{n / 1e6:.3f}" for n in counts), published])
        gflops.append([label, *(f"{n / 1e9:.{2 if n > 1e9 else 5}f}" for n in work), *rates])
    return [*aligned(millions), "", *aligned(gflops)]


def paper_notes(geometry: Geometry, table: Costs, paper: Mapping[str, tuple]) -> list[str]:
    """Where our figures and the paper's part, each difference as a number."""
    t5, (S, T, V), R = geometry.t5, geometry.lengths, geometry.rank
    means = 2 * (t5.d_model * 384 + 384 * 128) * (S + V - 2) / 1e9
    scores = t5.num_heads * (t5.num_layers * (S * S + T * T + S * T) + 2 * V * V + S * V) / 1e9
    full, ours, lora = (table[label]["train"].forward / 1e9 + means + scores
                        for label in ("full", "clorae", "lora"))
    halved = replace(geometry, rank=R // 2)
    half, pair = (halved.forward(method) + means + scores for method in ("lora", "loramoe"))
    twice = half + (lora - full) * t5.d_model / (2 * R)  # a frozen q or v has 2 D^2, its LoRA 4 D R
    lacking = {label: paper[label][0] - sum(table[label]["paper"].trainable.values()) / 1e6
               for label in ("full", "clorae")}
    return [
        f"full: UMIE projects each token for its gate, we the means (+{means:.3f}); the paper's "
        f"tool adds 1 FLOP per attention score (+{scores:.3f}). So counted: {full:.2f}, paper "
        f"{paper['full'][1]}; and likewise below.",
        f"clorae: {ours:.2f}, paper {paper['clorae'][1]}: U, one task expert, gate, all at rank R.",
        f"lora: {lora:.2f} at rank R, {half:.2f} at R/2, paper {paper['lora'][1]}; its TP is that "
        "of rank R.",
        f"moslora: {twice:.2f} if it were rank R/2 with the frozen q and v computed twice, paper "
        f"{paper['moslora'][1]}; here they are computed once.  Its TP fits a mixer of (R/2)^2.",
        f"loramoe: {pair:.2f} with two experts of rank R/2, paper {paper['loramoe'][1]}; its TP "
        "is that of rank R.",
        f"TP: all:paper leaves {lacking['full']:.1f} (full) and {lacking['clorae']:.2f} (clorae) "
        "that no part of the model has."]


def cost_report(geometry: Geometry, paper: Mapping[str, tuple]) -> str:
    """Table 5 for one backbone, beside the paper's figures, and how to read it."""
    table, (S, T, V) = costs(geometry), geometry.lengths
    ours, full = table["clorae"]["train"], table["full"]["train"]
    share = (ours.forward + ours.backward) / (full.forward + full.backward)
    once, row = mim_flops(geometry.model("clorae"), geometry.lengths)
    known = paper and geometry.lengths == PAPER_LENGTHS
    return "\n".join([
        f"{geometry.name}, rank {geometry.rank}; one row of {S:.4g} source, {T:.4g} target, "
        f"{V:.4g} visual tokens; image features {geometry.features} wide", "",
        *cost_tables(table, paper), "",
        "visual: train = the whole adapter learns, paper = its embedding, frozen = nothing of it; "
        "VStack's experts always do.  3 fwd: the paper's convention.  fwd+bwd: input gradients "
        "above the lowest trained weight, weight gradients of trained weights.",
        f"clorae:train costs {100 * share:.0f} % of full, by 3 fwd "
        f"{100 * ours.forward / full.forward:.0f} %.  L_MIM comes on top, in training: "
        f"{once / 1e9:.2f} GFLOPs per micro-batch of one task, {row / 1e9:.2f} per row.  Not "
        "counted: image tower, optimizer, norms, softmax.",
        *(paper_notes(geometry, table, paper) if known else ())])


def run(args: argparse.Namespace, world: World) -> None:
    if args.checkpoint:
        geometry, paper = Geometry.of_run(*Job(args.checkpoint[0], args).load(world)), {}
    else:
        geometry = Geometry.of_size(args.size, SIZES[args.size].rank, args.lengths)
        paper = PAPER_COSTS.get(args.size, {})
    world.print(cost_report(geometry, paper))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.costs", description=__doc__.partition("\n\n")[0],
                    usage="%(prog)s [CKPT] [options]")
    run_options(parser, required=False, without=("cache", "missing_images", *DECODING))
    add = parser.add_argument_group("without CKPT").add_argument
    add("--size", choices=tuple(GEOMETRY), default="base", help="the backbone")
    add("--lengths", nargs=3, type=int, default=PAPER_LENGTHS, metavar=("N_E", "N_D", "N_V"),
        help="source, target, visual tokens of a row; default: 95 1 21, as the paper's figures")
    args = parser.parse_args(argv)
    if len(args.checkpoint) > 1:
        parser.error("the costs are those of one CKPT; name one at a time")
    carry_out(run, args)


if __name__ == "__main__":
    main()
