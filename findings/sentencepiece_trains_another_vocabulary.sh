#!/usr/bin/env bash
# One text, one command, three vocabularies: sentencepiece 0.2.1, 0.2.2 and 0.2.3 train differently.
#
# The unigram trainer (T5's kind of tokenizer) is deterministic within a version, so a tokenizer is
# often kept as "the text and the command that made it".  Patch releases change the outcome: the
# number of pieces, which pieces, and how a sentence is cut.  Weights trained with one are garbage
# with another, so the .model file has to be kept, not the recipe.
#
# Seen on 2026-11-28:
#   0.2.0 and 0.2.1  46 pieces, equal    "▁" "t" "h" "e" "▁" "q" "u" "ic" ...
#   0.2.2            48 pieces           "▁the" "▁" "q" "u" "ic" "k" ...
#   0.2.3            44 pieces           "▁" "t" "h" "e" "▁" "q" "u" "ic" ...
# Exits with 0 while the three differ so, with 1 once that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/probe.py" <<'PYTHON'
import sys

import sentencepiece

text = ["the quick brown fox jumps over the lazy dog near the old mill",
        "coffee and office staff met in the afternoon", "film for five friends"] * 50
sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix="unigram",
                                         vocab_size=100, hard_vocab_limit=False, minloglevel=2)
model = sentencepiece.SentencePieceProcessor("unigram.model")
print(sentencepiece.__version__, len(model), "pieces", model.encode(text[0], out_type=str)[:8])
expected = {"0.2.0": 46, "0.2.1": 46, "0.2.2": 48, "0.2.3": 44}
sys.exit(len(model) != expected[sentencepiece.__version__])
PYTHON
cd "$work"
python3 -m venv venv
for version in 0.2.0 0.2.1 0.2.2 0.2.3; do
    venv/bin/pip install --quiet "sentencepiece==$version"
    venv/bin/python probe.py
done
