#!/usr/bin/env bash
# T5's tokenizer in transformers 5.0.0 leaves the model's normaliser out: other ids for the same text.
#
# The sentencepiece model of T5 normalises text (NFKC: the ligature in "ﬁlm" becomes "fi", the
# subscript in "O₂" becomes "2") before it looks for pieces.  T5Tokenizer of version 5.0.0 reads the
# pieces of that very file but not its normaliser, so such text falls into unknown characters, and
# save_pretrained writes a tokenizer.json with "normalizer": null and no spiece.model beside it: what
# was saved that way stays wrong in later versions.  Text from the web and from PDF is full of these
# characters.
#
# Seen on 2026-11-28, for the two words "ﬁlm O₂":
#   sentencepiece 0.2.3   "fi" "l" "m" "▁" "O" "2", none unknown
#   4.57.6                the same pieces
#   5.0.0                 "ﬁ" and "₂" are unknown; tokenizer.json has normalizer null, no spiece.model
# Exits with 0 while that is so, with 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/probe.py" <<'PYTHON'
import json
import os
import sys

import sentencepiece
import transformers
from transformers import T5Tokenizer

if not os.path.exists("t5/spiece.model"):  # a model with T5's special tokens and normaliser
    os.mkdir("t5")
    text = ["a film of five friends at the mill", "O2 and x2 in plain digits"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix="t5/spiece", vocab_size=80, minloglevel=2,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
model = sentencepiece.SentencePieceProcessor("t5/spiece.model")
tokenizer = T5Tokenizer.from_pretrained("t5", extra_ids=0)
words = "\ufb01lm O\u2082"
ids = tokenizer(words, add_special_tokens=False).input_ids
print(transformers.__version__, tokenizer.tokenize(words), "sentencepiece:",
      model.encode(words, out_type=str))
assert model.unk_id() not in model.encode(words)
if transformers.__version__ < "5":
    sys.exit(ids != model.encode(words))
tokenizer.save_pretrained("saved")
normalizer = json.load(open("saved/tokenizer.json"))["normalizer"]
print("saved:", sorted(os.listdir("saved")), "normalizer:", normalizer)
sys.exit(not (model.unk_id() in ids and normalizer is None
              and "spiece.model" not in os.listdir("saved")))
PYTHON
cd "$work"
export HF_HUB_OFFLINE=1
for version in 4.57.6 5.0.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet torch==2.13.0 "transformers==$version" \
        sentencepiece==0.2.3 protobuf
    "$work/$version/bin/python" probe.py
done
