"""Time training step, decoding and layer as ratios within one run; a command, never a timed test.

    python tests/benchmark.py [step] [decode] [memory] [layer] [--beside TREE] [--minutes 10] ...
    python tests/benchmark.py padding --data CORPUS --t5 FOLDER

Random weights at flan-t5's geometry, text only.  Step and memory stand beside transformers with
peft's LoRA (R on q and v), decoding beside transformers and CTranslate2, where these are installed;
with --beside also beside another checkout of this project.  Each variant lives in a process of its
own, and they take turns (turns.py).  The layer, in this process, stands beside its frozen linear
and the floor of its arithmetic, 1 + 3 (R + r + 1) / D.  Printed are medians over the turns after
warm-up, the least and the largest, and ratios of medians.  The time limit is kept: there are fewer
turns where one takes long, and what does not fit is said to be left out.
tokens/s: source and target of a step, new tokens of a decoding; share: of the arithmetic rate that
a large matrix product reaches here in the same type.  memory: peak of a process that does five
steps (of the allocator on a GPU), without Adam's moments.  padding: the share of real tokens among
those of the rows that training computes.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
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
from fast import cuda, int8
from fast.experts import mutual_information
from fast.graphs import Graphs
from t5 import T5, Linear, T5Config
from tools.costs import GEOMETRY, FlopCounter
from turns import GONE, SETTINGS, Variant, take_turns
from vision import UMIE

PEERS = {name: importlib.util.find_spec(name) is not None
         for name in ("transformers", "peft", "ctranslate2")}
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
TASKS = [0, 0, 0, 1, 1, 1, 2, 2]
SOURCE, TARGET, NEW = 95, 16, 32  # tokens of a row of the step; new tokens of a decoding


def keep_memory() -> None:
    """Let glibc keep what is freed, for variants that share this process.

    By its rules large blocks go back to the system, and come from it page by page: thousands of
    faults, milliseconds of a layer, that one variant pays or another, as their order has it.  A
    variant with a process of its own pays what it would pay in its user's.
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
    device = torch.get_default_device()
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    return 2 * n ** 3 / min(timed(lambda: a @ b) for _ in range(9))


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


def layer(size: str, groups: int) -> None:
    """2,048 tokens of three tasks, forward and backward, in this process."""
    keep_memory()
    D, R = GEOMETRY[size][0], SIZES[size].rank
    types = [t for t in (torch.float32, torch.bfloat16) if not passed_over(t)]
    for dtype, dropout in ((t, p) for t in types for p in (0.0, 0.1)):
        with torch.get_default_device():
            rows = torch.arange(3).repeat_interleave(6)[:16]
            base = Linear(D, D, 0.02).to(dtype).requires_grad_(False)
            routing = clorae.Routing(("mner", "mre", "mee"))
            module = clorae.ExpertLinear(base, clorae.ExpertConfig(rank=R, dropout=dropout),
                                         routing, "memory").train()
            fast.speed_up(module)
            x = torch.randn(16, 128, D, dtype=dtype, requires_grad=True)
            dy = torch.randn(16, 128, D, dtype=dtype)
            mask = torch.ones(16, 128, dtype=torch.bool)

        def experts(with_mim: bool) -> None:
            routing.set(rows, memory=mask)
            if with_mim:
                clorae.keep_outputs(module)
            y = module(x)
            extra = [mutual_information(module, 16)] if with_mim else []
            torch.autograd.backward([y, *extra], [dy, *map(torch.ones_like, extra)])

        floor = 1 + 3 * (R + R // 3 + 1) / D
        runs = {"frozen nn.Linear": lambda: base(x).backward(dy),
                "experts": lambda: experts(False), "experts with L_MIM": lambda: experts(True)}
        take_turns(f"layer, {size}, {dtype}, dropout {dropout}, floor {floor:.2f}x",
                   {name: lambda run=run: timed(run) for name, run in runs.items()}, groups)
        groups -= 1


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
    if model.lm_head.weight is model.shared.weight:  # transformers 5 ties them all the same
        model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
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
    """The same of the peer."""
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


def step_names() -> list[str]:
    """The variants of a step that can be had here, but for another tree's."""
    peer = ["transformers + peft LoRA"] * (PEERS["transformers"] and PEERS["peft"])
    graph = ["C-LoRAE, CUDA graph"] * (fast.form_on(torch.get_default_device()) == "cuda")
    return [*peer, "C-LoRAE", "C-LoRAE without L_MIM", *graph]


def variants(what: str, names: list[str], other: str) -> dict[str, Variant]:
    """These variants of this tree, and one of the tree that --beside gives."""
    started = {name: Variant(what, name) for name in names}
    if SETTINGS.beside:
        started[f"{SETTINGS.label}, {other}"] = Variant(what, other, SETTINGS.beside)
    return started


def step(size: str, groups: int) -> None:
    """Forward and backward of a training step; on a GPU in bf16, and also as a CUDA graph."""
    dtype, names = types()[0], step_names()
    with torch.device("meta"):
        counter = FlopCounter(ours(size), SOURCE, TARGET, 0)
    ideal = 8 * (counter.forward + counter.backward) / peak_rate(dtype)
    started = variants("step", names, "C-LoRAE")
    take_turns(f"training step, {size}, {dtype}, 8 x ({SOURCE} + {TARGET}) tokens",
               {name: lambda each=each: each.ask(8) for name, each in started.items()}, groups,
               8 * (SOURCE + TARGET), (names[0], *set(started).difference(names)),
               {"C-LoRAE without L_MIM": ideal})


def memory(size: str, groups: int) -> None:
    """Peak memory, one variant after the other."""
    print(f"\npeak memory of five training steps, {size}", flush=True)
    names = [name for name in step_names() if name in ("transformers + peft LoRA", "C-LoRAE")]
    peaks: dict[str, float] = {}
    for name, variant in variants("memory", names, "C-LoRAE").items():
        try:
            for _ in range(5):
                variant.ask(8)
            peaks[name] = variant.ask("peak")
            ratios = "".join(f"   {peaks[name] / peak:.2f}x of {other}"
                             for other, peak in peaks.items() if other != name)
            print(f"  {name:28}{peaks[name]:9.0f} MiB{ratios}", flush=True)
        except (TimeoutError, *GONE) as problem:
            print(f"  {name:28} left out: {problem}", flush=True)
        variant.end()


def decode(size: str, groups: int) -> None:
    """Greedy tokens of T5 alone and through experts, for one sequence and for eight."""
    gpu = torch.get_default_device().type == "cuda"
    half = ["T5, bf16", "T5, bf16, CUDA graphs"] if gpu else ["T5, int8"]
    peers = ["transformers, fp32"] * PEERS["transformers"]
    if PEERS["transformers"] and PEERS["ctranslate2"] and not gpu:
        peers += ["CTranslate2, fp32", "CTranslate2, int8"]
    adapted = ["C-LoRAE, fp32", "C-LoRAE, fp32, CUDA graphs" if gpu else "C-LoRAE, int8"]
    for names in (["T5, fp32", *half, *peers], adapted):
        started = variants("decode", names, names[0])
        others = set(started).difference(names)
        for rows in (1, 8):
            take_turns(f"{NEW} greedy tokens, {size}, {rows} sequence(s), {SOURCE} source tokens",
                       {name: lambda each=each: each.ask(rows) for name, each in started.items()},
                       groups, rows * NEW, (names[0], *others, *peers))
            groups -= 1
        for variant in started.values():
            variant.end()


def decoding(name: str, size: str) -> Callable[[int], Callable[[], object]]:
    """A variant of `decode`: number of rows -> one decoding."""
    engine, how, *_ = name.split(", ")
    if engine == "CTranslate2":
        return ctranslate2_decoding(size, how)
    if engine == "transformers":
        model, options = peer(size, lora=False).eval(), {
            "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    else:
        model = ours(size).eval() if engine == "C-LoRAE" else T5(geometry(size)).eval()
        model.to(torch.bfloat16 if how == "bf16" else torch.float32)
        fast.speed_up(model)
        if how == "int8":
            int8.quantize(model)
        (model.t5 if engine == "C-LoRAE" else model).graphs = "CUDA graphs" in name
        options = {"max_new_tokens": NEW, "banned_ids": [1]}

    def runs(rows: int) -> Callable[[], object]:
        b = batch(rows).to(torch.get_default_device())
        if engine == "C-LoRAE":
            return lambda: model.generate(b, **options)
        return lambda: model.generate(input_ids=b.input_ids,
                                      attention_mask=b.attention_mask.long(), **options)

    return runs


def ctranslate2_decoding(size: str, how: str) -> Callable[[int], Callable[[], object]]:
    """The same by CTranslate2, from transformers' model with a vocabulary that names its ids."""
    import ctranslate2
    from ctranslate2.converters.transformers import T5Loader
    model = peer(size, lora=False)
    words = ["<pad>", "</s>", "<unk>", *(f"<{i}>" for i in range(3, model.config.vocab_size))]
    with torch.no_grad():
        spec = T5Loader().get_model_spec(model)
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.bos_token = spec.config.decoder_start_token = "<pad>"
    spec.config.eos_token, spec.config.unk_token = "</s>", "<unk>"
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        engine = ctranslate2.Translator(folder, "cpu", intra_threads=torch.get_num_threads(),
                                        compute_type={"fp32": "float32"}.get(how, how))

    def runs(rows: int) -> Callable[[], object]:
        sources = [[words[i] for i in row] for row in batch(rows).input_ids.tolist()]
        return lambda: engine.translate_batch(sources, beam_size=1, max_decoding_length=NEW,
                                              min_decoding_length=NEW)

    return runs


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


def machine() -> str:
    """The processor, its instructions that matter here, torch, threads, and the peers."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    lines = dict(line.split(":", 1) for line in info.replace("\t", "").splitlines() if ":" in line)
    flags = set(lines.get("flags", "").split())
    gpu = f", {torch.cuda.get_device_name()}" if SETTINGS.device == "cuda" else ""
    peers = [f"{name} {importlib.metadata.version(name)}" if here else f"no {name} installed"
             for name, here in PEERS.items()]
    return (f"{lines.get('model name', platform.processor()).strip()}, family "
            f"{lines.get('cpu family', '?').strip()}, model {lines.get('model', '?').strip()}, "
            f"{torch.backends.cpu.get_cpu_capability()} "
            f"({' '.join(name for name in INSTRUCTIONS if name in flags)}){gpu}, torch "
            f"{torch.__version__}, {SETTINGS.threads} threads\npeers: {', '.join(peers)}")


def main() -> None:
    sections = {"step": step, "decode": decode, "memory": memory, "layer": layer}
    calls = {"step": 1, "decode": 4, "memory": 1, "layer": 4}  # of take_turns, as time is shared
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", choices=(*sections, "padding", []), default=[])
    parser.add_argument("--size", choices=tuple(GEOMETRY), default="base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="turns, where the time allows them")
    parser.add_argument("--minutes", type=float, default=10, help="in which all must end")
    parser.add_argument("--beside", type=Path, help="another checkout, measured in the same turns")
    parser.add_argument("--data", help="corpus folder, for padding")
    parser.add_argument("--t5", help="folder with spiece.model, for padding")
    args = parser.parse_args(namespace=SETTINGS)
    args.deadline = time.monotonic() + 60 * args.minutes
    args.label = args.beside and args.beside.resolve().name
    torch.set_num_threads(args.threads)
    torch.get_default_device = lambda: torch.device(args.device)  # see one_variant.py
    torch.manual_seed(0)
    print(machine(), flush=True)
    what = args.what or list(sections)
    for i, name in enumerate(what):
        try:
            if name == "padding":
                padding(args.data, args.t5)
            elif time.monotonic() > args.deadline:
                print(f"\nleft out, since the time is up: {name}")
            else:
                sections[name](args.size, sum(calls.get(each, 0) for each in what[i:]))
        finally:
            for variant in list(Variant.running):
                variant.end()


if __name__ == "__main__":
    main()
