"""What a run (a train.Run, handed in) will do and need; --dry-run prints it and stops."""

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch

from engine.checkpoints import Sources, newest_checkpoint, read_state
from engine.corpus import unit_rows
from engine.files import file_hash
from engine.schema import SPLITS
from engine.settings import Config, Launch


def describe(run: Any, start: str) -> list[str]:
    """The lines that a run begins with; `start` says what it goes on from."""
    config, world, rows, origin = run.config, run.world, run.rows, run.origin
    total = sum(p.numel() for p in run.model.parameters())
    counted = {split: unit_rows(r, run.setup.datasets) for split, r in rows.records.items()}
    steps = min(config.steps or math.inf, len(rows.batches(0)) * config.epochs)
    lines = [
        f"device: {world.device}, torch {torch.__version__}, {world.size} process(es), "
        f"{config.precision}, modules in the form {run.form}"
        f"{', CUDA graphs' * config.graphs}, seed {config.seed}",
        f"method: {config.method}, rank {config.rank}, {len(run.experts)} wrapped linears, visual "
        f"adapter: {config.visual_policy}, AML {'on' if config.aml else 'off'}, MIM "
        f"{'on' if config.uses_mim else 'off'}",
        f"trainable: {sum(run.trained.values()):,} of {total:,} parameters ("
        + ", ".join(f"{group} {count:,}" for group, count in run.trained.items() if count) + ")",
        "rows: " + "; ".join(f"{split} " + ", ".join(f"{u} {n}" for u, n in units.items())
                             for split, units in counted.items() if units),
        f"images: {rows.features.missing_rows} rows without their image",
        f"steps: {steps} of batch {config.batch} (micro-batches of {config.micro_batch}), "
        f"{config.epochs} epochs, lr {config.lr:g} halved every {config.lr_epochs}",
        f"backbone: {origin['t5']} sha256 {origin['t5_sha256'][:12]}, "
        f"{origin['vit']} sha256 {origin['vit_sha256'][:12]}",
        *([rows.held_out] if rows.held_out else []), f"output: {run.out}", start]
    if missing := [unit for unit in rows.units if unit not in counted["dev"]]:
        lines.append(f"note: no dev rows for {', '.join(missing)}: no say in which epoch is the "
                     "best (without any dev rows it is the last)"
                     + ", and their achievement stays 0" * config.aml)
    if config.aml and config.data is not None and config.aml_reference is None:
        lines.append("note: AML measures by the paper's test F1 of single-task models ("
                     + ", ".join(f"{unit} {run.reference[unit]}" for unit in rows.units)
                     + "; of MED and MEAE on M2E2), which other data than the published do not "
                     "match: give references for yours with --aml-reference")
    if config.steps and steps < config.steps:
        lines.append(f"note: --steps {config.steps}, but {config.epochs} epochs end before; raise "
                     "--epochs")
    busy = math.ceil(min(config.batch, len(rows.examples)) / config.micro_batch)
    if busy < world.size:
        lines.append(f"note: a batch makes {busy} micro-batches for {world.size} processes, so "
                     f"{world.size - busy} only wait; start fewer, or lower --micro-batch")
    return lines


def memory(run: Any, piece: int) -> dict[str, float]:
    """Bytes that training takes, term by term, for a micro-batch of the longest rows; measured: to
    about 10 %.  Activations are what autograd keeps, per token (D model width, H heads of width K):
      attention     3 D (5 D with T5's dropout) + 5 H K + 16 per column of the experts, and 4 D with
                    the experts' dropout; on a CPU T5's dropout keeps 3 H scores per key as well
      feed-forward  3 times its width (4 times with dropout)
    --graphs takes it twice, since graphs share memory with nothing else.  Then three copies of the
    logits, of which `piece` rows are held at once, and two of the experts, for L_MIM."""
    config, t5, examples = run.config, run.model.t5.config, run.rows.examples
    frozen, trained = (sum(p.numel() * p.element_size() for p in run.model.parameters()
                           if p.requires_grad == learns) for learns in (False, True))
    S, T = (max(len(getattr(e, side)) for e in examples) for side in ("input_ids", "labels"))
    V = 1 + max(min(len(e.record.objects), config.max_objects) for e in examples)
    drop = (t5.dropout_rate if config.backbone_dropout is None else config.backbone_dropout) > 0
    scores = 3 * t5.num_heads * (drop and run.world.device.type == "cpu")
    experts = run.trained["experts"]
    columns = sum(next(iter(run.experts.values())).widths) if experts else 0
    attention = ((3 + 2 * drop + 4 * (config.dropout > 0 and experts > 0)) * t5.d_model
                 + 5 * t5.num_heads * t5.d_kv + 16 * columns)

    def block(attentions: int, tokens: int, keys: int) -> int:
        return tokens * (attentions * attention + (3 + drop) * t5.d_ff + scores * keys)

    layers, rows = t5.num_decoder_layers, min(config.micro_batch, config.batch)
    blocks = [block(1, S, S)] * t5.num_layers + [block(2, T, S + T)] * layers + 2 * [block(1, V, V)]
    numbers = sum(blocks)
    if config.checkpoint_activations:  # what enters each block, and all of one of them
        numbers = max(blocks) + (t5.num_layers * S + layers * T + 2 * V) * t5.d_model
    kept = rows * numbers * (2 if config.precision == "bf16" else 4) * (1 + config.graphs)
    logits = 12 * min(rows * T, piece) * t5.vocab_size
    process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"frozen weights": frozen, "trained": trained, "gradients": trained,
            "moments": 2 * trained, f"activations of {rows} rows of {S} + {T} + {V} tokens":
                kept + logits + 8 * experts, "the process itself": process}


def plan(run: Any, sources: Sources, launch: Launch, piece: int) -> list[str]:
    """What a run would use, from configurations, headers and the corpus; piece: see `memory`."""
    newest = newest_checkpoint(run.out) if launch.resume == "auto" else launch.resume
    start = "from the beginning" if newest in (None, "none") else f"would resume {newest}"
    if finished(run.config, launch):
        start = "this run is finished, its table would be printed again"
    files = [path for folder in (sources.t5, sources.vit, sources.init) if folder for path
             in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".model")]
    names = ("dataset.json", *(f"{split}.jsonl" for split in SPLITS))
    files += sorted(path for path in sources.corpus.glob("*/*") if path.name in names)
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    terms = memory(run, piece)
    return [f"dry run: nothing is trained, nothing is written to {run.out}",
            *(f"file: {path}, {path.stat().st_size:,} bytes, sha256 {file_hash(path)[:12]}"
              for path in files),
            *describe(run, f"start: {start}"), f"frozen: {frozen:,} parameters",
            f"memory per process: about {sum(terms.values()) / 1e9:.2f} GB = "
            + " + ".join(f"{name} {value / 1e9:.2f}" for name, value in terms.items())]


def finished(config: Config, launch: Launch) -> str | None:
    """The table of a run that is complete already, if the same command is given again."""
    table = Path(config.out) / "table.txt"
    if launch.resume != "auto" or not table.exists():
        return None
    newest, mine = newest_checkpoint(table.parent), json.loads(json.dumps(vars(config)))
    same = newest is not None and read_state(newest)["config"].items() <= mine.items()
    return table.read_text(encoding="utf-8") if same else None
