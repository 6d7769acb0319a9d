"""Time layer, training step and decoding as ratios within one run; a command, never a timed test.

    python tests/benchmark.py [layer] [step] [decode] [memory] [--size base] [--device cuda] ...
    python tests/benchmark.py padding --data CORPUS --t5 FOLDER

Random weights at flan-t5's geometry, text only.  The layer is set beside its frozen linear and the
floor of its arithmetic, 1 + 3 (R + r + 1) / D; step and decoding beside transformers with peft's
LoRA (R on q and v), if this environment has them: they belong into one of their own.  All variants
take turns; printed are medians over the repeats, after warm-up, and their ratio to the first.
tokens/s: source and target of a step, new tokens of a decoding; share: of the arithmetic rate that
a large matrix product reaches here in the same type.  memory: peak of a process that does five
steps (of the allocator on a GPU), without Adam's moments.  padding: the share of real tokens among
those of the rows that training computes.
"""

import argparse
import ctypes
import importlib.util
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import clorae
import data
import fast
import losses
from engine.corpus import load_corpus, load_datasets
from engine.settings import SIZES, slow_bf16
from fast import cuda
from fast.experts import mutual_information
from fast.graphs import Graphs
from t5 import T5, Linear, T5Config
from tools.costs import GEOMETRY, FlopCounter
from vision import UMIE

PEER = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
TASKS = [0, 0, 0, 1, 1, 1, 2, 2]
SOURCE, TARGET, NEW = 95, 16, 32  # tokens of a row of the step; new tokens of a decoding


def keep_memory() -> None:
    """Let glibc keep what is freed, for all variants alike.

    By its rules large blocks go back to the system, and come from it page by page: thousands of
    faults, milliseconds of a layer, that one variant pays or another, as their order has it.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object]) -> float:
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def peak_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices."""
    n = 8192 if torch.get_default_device().type == "cuda" else 1536
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n ** 3 / min(timed(lambda: a @ b) for _ in range(9))


def take_turns(title: str, variants: dict[str, Callable[[], object]], repeats: int,
               tokens: int = 0, work: dict[str, tuple[float, torch.dtype]] | None = None) -> None:
    """Print the median wall time of every variant and its ratio to the first; the tokens of a run
    and work, {variant: (FLOPs, type)}, add its rate and the share of the device's own."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 2):
        for name, run in variants.items():
            seconds = timed(run)
            if turn >= 2:
                times[name].append(seconds)
    first = statistics.median(next(iter(times.values())))
    print(f"\n{title}")
    for name, some in times.items():
        middle = statistics.median(some)
        rate = f"{tokens / middle:9.0f} tokens/s" if tokens else ""
        if work and name in work:
            flops, dtype = work[name]
            rate += f"{100 * flops / middle / peak_rate(dtype):4.0f} % of peak"
        print(f"  {name:28}{1e3 * middle:10.1f} ms {middle / first:8.2f}x   "
              f"({1e3 * min(some):.1f} .. {1e3 * max(some):.1f}) {rate}", flush=True)


def passed_over(dtype: torch.dtype) -> bool:
    """Whether a type would take hours here, which is said: bf16 on a CPU that is slow in it."""
    on_cpu = torch.get_default_device().type == "cpu"
    factor = slow_bf16() if on_cpu and dtype == torch.bfloat16 else None
    if factor:
        print(f"\nskipped: bf16, which takes {factor:.0f} times as long as fp32 on this CPU")
    return factor is not None


def geometry(size: str) -> T5Config:
    D, hidden, layers, heads = GEOMETRY[size]
    return T5Config(32128, D, 64, hidden, layers, heads, feed_forward_proj="gated-gelu",
                    tie_head=False, scale_logits=False)


def layer(size: str, repeats: int) -> None:
    """2,048 tokens of three tasks, forward and backward."""
    D, R = GEOMETRY[size][0], SIZES[size].rank
    rows = torch.arange(3).repeat_interleave(6)[:16]
    types = [t for t in (torch.float32, torch.bfloat16) if not passed_over(t)]
    for dtype, dropout in ((t, p) for t in types for p in (0.0, 0.1)):
        base = Linear(D, D, 0.02).to(dtype).requires_grad_(False)
        plain = nn.Linear(D, D, bias=False).to(dtype).requires_grad_(False)
        routing = clorae.Routing(("mner", "mre", "mee"))
        module = clorae.ExpertLinear(base, clorae.ExpertConfig(rank=R, dropout=dropout), routing,
                                     "memory").train()
        fast.speed_up(module)
        x = torch.randn(16, 128, D, dtype=dtype, requires_grad=True)
        dy, mask = torch.randn(16, 128, D, dtype=dtype), torch.ones(16, 128, dtype=torch.bool)

        def experts(with_mim: bool) -> None:
            routing.set(rows, memory=mask)
            if with_mim:
                clorae.keep_outputs(module)
            y = module(x)
            extra = [mutual_information(module, 16)] if with_mim else []
            torch.autograd.backward([y, *extra], [dy, *map(torch.ones_like, extra)])

        floor = 1 + 3 * (R + R // 3 + 1) / D
        take_turns(f"layer, {size}, {dtype}, dropout {dropout}, floor {floor:.2f}x", {
            "frozen nn.Linear": lambda: plain(x).backward(dy),
            "frozen t5.Linear": lambda: base(x).backward(dy), "experts": lambda: experts(False),
            "experts with L_MIM": lambda: experts(True)}, repeats)


def ours(size: str) -> UMIE:
    model = clorae.adapt(UMIE(T5(geometry(size)), 768), "clorae", SIZES[size].rank)
    fast.speed_up(model)
    return model


def peer(size: str, lora: bool) -> nn.Module:
    """transformers' T5 at the same geometry, with peft's LoRA or plain."""
    import peft
    import transformers
    D, hidden, layers, heads = GEOMETRY[size]
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=32128, d_model=D, d_kv=64, d_ff=hidden, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0))
    R = SIZES[size].rank
    settings = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["q", "v"], lora_dropout=0.1,
                               task_type="SEQ_2_SEQ_LM")
    return peft.get_peft_model(model, settings) if lora else model


def batch(rows: int) -> data.Batch:
    """8 samples, or the first of them, in the host's memory."""
    def ids(width: int) -> Tensor:
        return torch.randint(3, 32000, (8, width))[:rows]

    with torch.device("cpu"):
        return data.Batch(
            input_ids=ids(SOURCE), attention_mask=torch.ones(rows, SOURCE, dtype=torch.bool),
            labels=ids(TARGET), real=torch.arange(rows * TARGET), tasks=torch.tensor(TASKS)[:rows],
            units=torch.zeros(rows, dtype=torch.long), rows=torch.arange(rows),
            features=torch.zeros(rows, 0, 768), boxes=torch.zeros(rows, 0, 5),
            visual_mask=torch.zeros(rows, 0, dtype=torch.bool))


def in_type(model: nn.Module, dtype: torch.dtype) -> Callable[[], torch.autocast]:
    """The frozen weights of a model in a type, and the autocast that goes with it."""
    for parameter in model.train().parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    kind = torch.get_default_device().type
    return lambda: torch.autocast(kind, torch.bfloat16, dtype == torch.bfloat16)


def our_steps(size: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Forward and backward of a training step, dropout on, with and without L_MIM; on a GPU also as
    a CUDA graph."""
    model, host, device = ours(size), batch(8), torch.get_default_device()
    autocast = in_type(model, dtype)
    there = host.to(device)

    def mine(with_mim: bool, b: data.Batch = there) -> Tensor:
        if with_mim:
            clorae.keep_outputs(model)
        with autocast():
            ce = losses.token_cross_entropy(model.hidden(b), b.labels, model.t5.head, real=b.real)
        loss = ce.sum() / b.labels.numel()
        if with_mim:
            loss = loss + 0.01 * mutual_information(model, 8)
        loss.backward()
        return loss.detach()

    steps = {"C-LoRAE": lambda: mine(True), "C-LoRAE without L_MIM": lambda: mine(False)}
    if fast.form_on(device) == "cuda":
        graphs = Graphs(lambda b, _: mine(True, b), device)
        cuda.keep_tasks_on_gpu(model)
        steps["C-LoRAE, CUDA graph"] = lambda: graphs(host, torch.zeros(1, device="cpu"))
    return steps


def peer_steps(size: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The same of the peer, if it is installed."""
    if not PEER:
        return {}
    model, b = peer(size, lora=True), batch(8).to(torch.get_default_device())
    autocast = in_type(model, dtype)

    def theirs() -> None:
        with autocast():
            loss = model(input_ids=b.input_ids, attention_mask=b.attention_mask.long(),
                         labels=b.labels).loss
        loss.backward()

    return {"transformers + peft LoRA": theirs}


def types() -> list[torch.dtype]:
    """fp32; on a GPU bf16 before it."""
    cuda = torch.get_default_device().type == "cuda"
    return [torch.bfloat16] * cuda + [torch.float32]


def step(size: str, repeats: int) -> None:
    with torch.device("meta"):
        counter = FlopCounter(ours(size), SOURCE, TARGET, 0)
    for dtype in types():
        take_turns(f"training step, {size}, {dtype}, 8 x ({SOURCE} + {TARGET}) tokens",
                   peer_steps(size, dtype) | our_steps(size, dtype), repeats,
                   8 * (SOURCE + TARGET),
                   {"C-LoRAE without L_MIM": (8 * (counter.forward + counter.backward), dtype)})


def memory(size: str, repeats: int) -> None:
    """Each variant in a process of its own."""
    print(f"\npeak memory of five training steps, {size}")
    for name in (*(["transformers + peft LoRA"] if PEER else []), "C-LoRAE"):
        subprocess.run([sys.executable, __file__, "--size", size, "--peak-of", name, "--device",
                        torch.get_default_device().type], check=True)


def peak_of(name: str, size: str) -> None:
    """Five times forward and backward of one variant, then the peak."""
    make = our_steps if name == "C-LoRAE" else peer_steps
    run = make(size, types()[0])[name]
    for _ in range(5):
        run()
    wait()
    cuda = torch.get_default_device().type == "cuda"
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2 ** 20
    else:  # ru_maxrss would be the parent's, if that was larger before this process began
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2 ** 10
    print(f"  {name:28}{peak:10.0f} MiB", flush=True)


def decode(size: str, repeats: int) -> None:
    """Greedy tokens of T5 alone and through experts, for one sequence and for eight."""
    single, half = T5(geometry(size)).eval(), T5(geometry(size)).to(torch.bfloat16).eval()
    for model in (single, half):
        fast.speed_up(model)
    adapted, theirs = ours(size).eval(), peer(size, lora=False).eval() if PEER else None
    models = [("fp32", single)] + [("bf16", half)] * (not passed_over(torch.bfloat16))
    for rows in (1, 8):
        b = batch(rows).to(torch.get_default_device())
        variants = {f"T5, {name}": lambda model=model: model.generate(
            b.input_ids, b.attention_mask, NEW, banned_ids=[1])
            for name, model in models}
        variants["C-LoRAE, fp32"] = lambda: adapted.generate(b, NEW, banned_ids=[1])
        if torch.get_default_device().type == "cuda":
            variants |= {
                "T5, bf16, CUDA graphs": lambda: by_graphs(half, variants["T5, bf16"]),
                "C-LoRAE, CUDA graphs": lambda: by_graphs(adapted.t5, variants["C-LoRAE, fp32"])}
        if PEER:
            variants = {"transformers, fp32": lambda: theirs.generate(
                input_ids=b.input_ids, attention_mask=b.attention_mask.long(), max_new_tokens=NEW,
                min_new_tokens=NEW, do_sample=False), **variants}
        take_turns(f"{NEW} greedy tokens, {size}, {rows} sequence(s)", variants, repeats,
                   rows * NEW)


def by_graphs(t5: T5, decodes: Callable[[], object]) -> None:
    """A decoding whose steps are captured."""
    t5.graphs = True
    decodes()
    t5.graphs = False


def padding(corpus: str, tokenizer: str) -> None:
    """Real over computed tokens of the first epoch of a corpus' training split, by size."""
    records = load_corpus(corpus, "train")
    examples = data.encode_records(records, load_datasets(corpus), data.Tokenizer(tokenizer),
                                   256, 192)
    print(f"\n{len(examples)} training examples: real of computed tokens")
    for name, size in SIZES.items():
        parts = [part for indices in data.global_batches(examples, 0, 0, size.batch)
                 for part in data.micro_batches(indices, examples, size.micro_batch)]
        shares = []
        for side in ("input_ids", "labels"):
            widths = [[len(getattr(examples[i], side)) for i in part] for part in parts]
            shares.append(sum(map(sum, widths)) / sum(len(w) * max(w) for w in widths))
        print(f"  {name:6} batch {size.batch}, micro-batch {size.micro_batch}: "
              f"source {shares[0]:.3f}, target {shares[1]:.3f} (head: 1; a CPU: all but attention)")


def main() -> None:
    sections = {"layer": layer, "step": step, "decode": decode, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", choices=(*sections, "padding", []), default=[])
    parser.add_argument("--size", choices=tuple(GEOMETRY), default="base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--data", help="corpus folder, for padding")
    parser.add_argument("--t5", help="folder with spiece.model, for padding")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    if args.peak_of:
        return peak_of(args.peak_of, args.size)
    keep_memory()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    print(f"torch {torch.__version__}, {name}, peer {'at hand' if PEER else 'not installed here'}")
    for what in args.what or sections:
        if what == "padding":
            padding(args.data, args.t5)
        else:
            sections[what](args.size, args.repeats)


if __name__ == "__main__":
    main()
