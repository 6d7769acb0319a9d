#!/usr/bin/env bash
# transformers 5 cannot make a new T5 v1.1: tie_word_embeddings=False builds a tied model.
#
# T5Config(tie_word_embeddings=False) is the configuration of T5 v1.1 and flan-t5, whose output head
# has weights of its own.  From version 5 on the model made from it has one tensor for embedding and
# head, and the configuration says tie_word_embeddings true, without a warning.  A T5 that is
# pretrained from scratch, or a small random one in a test, is then another architecture with fewer
# parameters than with version 4 (a checkpoint that holds both tensors still loads as two).
#
# Seen on 2026-11-28 with torch 2.13.0, for a vocabulary of 64 and d_model = 16:
#   4.57.6  6896 parameters, head and embedding apart, config says false
#   5.24.0  5872 parameters, one tensor, config says true
# Exits with 0 while that is so, with 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/probe.py" <<'PYTHON'
import sys

import transformers
from transformers import T5Config, T5ForConditionalGeneration

config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2,
                  feed_forward_proj="gated-gelu", tie_word_embeddings=False)
model = T5ForConditionalGeneration(config)
seen = (sum(p.numel() for p in model.parameters()),
        model.lm_head.weight is model.shared.weight, config.tie_word_embeddings)
print(transformers.__version__, "parameters %d, one tensor %s, tie_word_embeddings %s" % seen)
expected = {"4.57.6": (6896, False, False), "5.24.0": (5872, True, True)}
sys.exit(seen != expected[transformers.__version__])
PYTHON
cd "$work"
for version in 4.57.6 5.24.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
    "$work/$version/bin/python" probe.py
done
