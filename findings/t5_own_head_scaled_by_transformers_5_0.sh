#!/usr/bin/env bash
# transformers 5.0.0 divides the logits of T5 v1.1 and flan-t5 by sqrt(d_model).
#
# T5 v1.0 shares its embedding with the output head and scales the decoder's output by
# d_model ** -0.5 before it; v1.1 and flan-t5 have a head of their own and do not scale.  Up to
# version 4 `tie_word_embeddings: false` in config.json says so.  Version 5.0.0 keeps the head's own
# weights but overrides the setting with true, and scales: of a file written by 4.57.6 every logit
# comes out as 0.25 of what it was, for d_model = 16.  Greedy answers stay the same, so nobody
# notices; the loss, sampling, beam scores and whatever is trained that way change.  save_pretrained
# then writes "scale_decoder_outputs": true, which later versions honour: the change is for good.
# 5.24.0 reads the original file as 4.57.6 does.
#
# Seen on 2026-11-28 with torch 2.13.0:
#   4.57.6  writes a file of two tensors, embedding and head
#   5.0.0   logits / original = 0.2500; saved again with scale_decoder_outputs true
#   5.24.0  original file 1.0000; the file saved by 5.0.0: 0.2500
# Exits with 0 while that is so, with 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.0.0 5.24.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
done
cat > "$work/probe.py" <<'PYTHON'
import json
import sys

import torch
from transformers import T5Config, T5ForConditionalGeneration

step, source, *saved = sys.argv[1:]
ids = torch.arange(3, 9)[None]
if step == "make":
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()
    model.save_pretrained(source)
    torch.save(model(input_ids=ids, decoder_input_ids=ids).logits, "logits.pt")
else:
    model = T5ForConditionalGeneration.from_pretrained(source).eval()
    logits = model(input_ids=ids, decoder_input_ids=ids).logits
    ratio = (logits / torch.load("logits.pt")).median().item()
    print(f"{source}: logits / original = {ratio:.4f}")
    assert abs(ratio - float(step)) < 1e-4, f"expected {step}"
    for folder in saved:
        model.save_pretrained(folder)
        assert json.load(open(f"{folder}/config.json"))["scale_decoder_outputs"] is True
PYTHON
cd "$work"
export HF_HUB_OFFLINE=1
4.57.6/bin/python probe.py make v11 2> log || { cat log; exit 1; }
5.0.0/bin/python probe.py 0.25 v11 again 2> log || { cat log; exit 1; }
5.24.0/bin/python probe.py 1.0 v11 2> log || { cat log; exit 1; }
5.24.0/bin/python probe.py 0.25 again 2> log || { cat log; exit 1; }
