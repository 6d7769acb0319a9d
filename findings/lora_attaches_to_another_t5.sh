#!/usr/bin/env bash
# PEFT puts a LoRA on whatever T5 it is given, whichever one it was trained on.
#
# adapter_config.json names the base model of an adapter (base_model_name_or_path), but
# PeftModel.from_pretrained compares it with nothing: if the shapes agree (google/flan-t5-base and
# google/t5-v1_1-base have the same), the adapter is attached, and merged, without a warning, and the
# answers are those of neither model.  Saving it again keeps the first base's name.
#
# Seen on 2026-11-28 with torch 2.13.0, transformers 5.24.0, peft 0.21.2: no warning, the adapter's
# config still names "t5-one" while it sits on "t5-two".
# Exits with 0 while that is so, with 1 once a warning or an error says it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
export HF_HUB_OFFLINE=1
venv/bin/python - <<'PYTHON'
import json
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
for name in ("t5-one", "t5-two"):  # the same geometry, other weights
    T5ForConditionalGeneration(config).save_pretrained(name)
lora = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], init_lora_weights=False)
get_peft_model(T5ForConditionalGeneration.from_pretrained("t5-one"), lora).save_pretrained("lora")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(T5ForConditionalGeneration.from_pretrained("t5-two"), "lora")
model.save_pretrained("again")
named = json.load(open("again/adapter_config.json"))["base_model_name_or_path"]
about = [str(w.message) for w in caught if "base" in str(w.message).lower()]
print("attached to t5-two; warnings:", about, "the saved config names:", named)
sys.exit(bool(about) or named != "t5-one")
PYTHON
