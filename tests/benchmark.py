"""Time layer, training step and decoding as ratios within one run; a command, never a timed test.

    python tests/benchmark.py [layer] [step] [decode] [--size base] [--threads 2] [--repeats 9]

Random weights at flan-t5's geometry, text only.  The layer is set beside its frozen linear and the
floor of its arithmetic, 1 + 3 (R + r + 1) / D; step and decoding beside transformers with peft's
LoRA (R on q and v), if this environment has them: they belong into one of their own.  All variants
take turns; printed are medians over the repeats, after warm-up, and their ratio to the first.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import clorae
import evaluate
import losses
import train
from t5 import T5, T5Config
from vision import UMIE

PEER = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
TASKS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])


def take_turns(title: str, variants: dict[str, Callable[[], object]], repeats: int) -> None:
    """Print the median wall time of every variant and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 2):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    first = statistics.median(next(iter(times.values())))
    print(f"\n{title}")
    for name, some in times.items():
        middle = statistics.median(some)
        print(f"  {name:28}{1e3 * middle:10.1f} ms {middle / first:8.2f}x   "
              f"({1e3 * min(some):.1f} .. {1e3 * max(some):.1f})", flush=True)


def geometry(size: str) -> T5Config:
    D, hidden, layers, heads = evaluate.GEOMETRY[size]
    return T5Config(32128, D, 64, hidden, layers, heads, feed_forward_proj="gated-gelu",
                    tie_head=False, scale_logits=False)


def layer(size: str, repeats: int) -> None:
    """2,048 tokens of three tasks, forward and backward."""
    D, R = evaluate.GEOMETRY[size][0], train.SIZES[size].rank
    rows = torch.arange(3).repeat_interleave(6)[:16]
    for dtype, dropout in ((t, p) for t in (torch.float32, torch.bfloat16) for p in (0.0, 0.1)):
        base = nn.Linear(D, D, bias=False).to(dtype).requires_grad_(False)
        routing = clorae.Routing(("mner", "mre", "mee"))
        module = clorae.ExpertLinear(base, clorae.ExpertConfig(rank=R, dropout=dropout), routing,
                                     "memory").train()
        x = torch.randn(16, 128, D, dtype=dtype, requires_grad=True)
        dy, mask = torch.randn(16, 128, D, dtype=dtype), torch.ones(16, 128, dtype=torch.bool)

        def experts(mim: bool) -> None:
            routing.set(rows, memory=mask)
            routing.mim_batch = 16 if mim else None
            y = module(x)
            extra = [losses.mutual_information(routing.moments(), 1)] if mim else []
            torch.autograd.backward([y, *extra], [dy, *map(torch.ones_like, extra)])

        floor = 1 + 3 * (R + R // 3 + 1) / D
        take_turns(f"layer, {size}, {dtype}, dropout {dropout}, floor {floor:.2f}x", {
            "frozen linear": lambda: base(x).backward(dy), "experts": lambda: experts(False),
            "experts with L_MIM": lambda: experts(True)}, repeats)


def ours(size: str) -> UMIE:
    model = UMIE(T5(geometry(size)), 768)
    return clorae.adapt(model, "clorae", train.SIZES[size].rank)


def peer(size: str, lora: bool) -> nn.Module:
    """transformers' T5 at the same geometry, with peft's LoRA or plain."""
    import peft
    import transformers
    D, hidden, layers, heads = evaluate.GEOMETRY[size]
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=32128, d_model=D, d_kv=64, d_ff=hidden, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0))
    R = train.SIZES[size].rank
    settings = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["q", "v"], lora_dropout=0.1,
                               task_type="SEQ_2_SEQ_LM")
    return peft.get_peft_model(model, settings) if lora else model


def batch(rows: int) -> SimpleNamespace:
    """8 samples of 95 text and 16 target tokens, or the first of them."""
    def ids(width: int) -> Tensor:
        return torch.randint(3, 32000, (8, width))[:rows]

    return SimpleNamespace(
        input_ids=ids(95), attention_mask=torch.ones(rows, 95, dtype=torch.bool), labels=ids(16),
        tasks=TASKS[:rows], features=torch.zeros(rows, 0, 768), boxes=torch.zeros(rows, 0, 5),
        visual_mask=torch.zeros(rows, 0, dtype=torch.bool))


def step(size: str, repeats: int) -> None:
    """Forward and backward of a training step, dropout on; ours with and without L_MIM."""
    model, b = ours(size).train(), batch(8)
    layers = len(clorae.expert_layers(model))

    def mine(mim: bool) -> None:
        model.routing.mim_batch = 8 if mim else None
        loss = losses.token_cross_entropy(
            model.hidden(b), b.labels, model.t5.head).sum() / b.labels.numel()
        if mim:
            loss = loss + 0.01 * losses.mutual_information(model.routing.moments(), layers)
        loss.backward()

    variants = {"C-LoRAE": lambda: mine(True), "C-LoRAE without L_MIM": lambda: mine(False)}
    if PEER:
        theirs = peer(size, lora=True).train()
        variants = {"transformers + peft LoRA": lambda: theirs(
            input_ids=b.input_ids, attention_mask=b.attention_mask.long(),
            labels=b.labels).loss.backward(), **variants}
    take_turns(f"training step, {size}, fp32, 8 x (95 + 16) tokens", variants, repeats)


def decode(size: str, repeats: int) -> None:
    """32 greedy tokens of T5 alone, for one sequence and for eight."""
    single, half = T5(geometry(size)).eval(), T5(geometry(size)).to(torch.bfloat16).eval()
    adapted, theirs = ours(size).eval(), peer(size, lora=False).eval() if PEER else None
    for rows in (1, 8):
        b = batch(rows)
        variants = {f"T5, {name}": lambda model=model: model.generate(
            b.input_ids, b.attention_mask, 32, banned_ids=[1])
            for name, model in (("fp32", single), ("bf16", half))}
        variants["C-LoRAE, fp32"] = lambda: adapted.generate(b, 32, banned_ids=[1])
        if PEER:
            variants = {"transformers, fp32": lambda: theirs.generate(
                input_ids=b.input_ids, attention_mask=b.attention_mask.long(), max_new_tokens=32,
                min_new_tokens=32, do_sample=False), **variants}
        take_turns(f"32 greedy tokens, {size}, {rows} sequence(s)", variants, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", choices=("layer", "step", "decode", []), default=[])
    parser.add_argument("--size", choices=tuple(evaluate.GEOMETRY), default="base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, peer "
          + ("at hand" if PEER else "not installed here"))
    for name in args.what or ("layer", "step", "decode"):
        {"layer": layer, "step": step, "decode": decode}[name](args.size, args.repeats)


if __name__ == "__main__":
    main()
