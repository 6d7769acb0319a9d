#!/usr/bin/env bash
# The same tall picture gives a ViT or CLIP other pixels with Pillow 13 than with Pillow 12.
#
# ViT resizes to 224 x 224 with bilinear, CLIP with bicubic resampling, both through Pillow where
# torchvision is absent.  Pillow 13.0.0 resizes the columns of a tall picture before its rows; each
# pass rounds to 8 bits, so the result differs.  Golden pixel values and cached image features then
# depend on Pillow's version; square pictures, which tests often use, agree.
#
# Seen on 2026-11-28, a 96 x 700 pattern to 224 x 224, 12.3.0 against 13.0.0:
#   bilinear  up to 1 level of 255, 5 % of the values
#   bicubic   up to 14 levels, 7 % of the values
#   its upper 96 x 96 square: equal
# Exits with 0 while that is so, with 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/resize.py" <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

y, x = np.mgrid[:700, :96]
tall = np.stack([x * 7 % 256, y * 5 % 256, x * y % 256], axis=-1).astype(np.uint8)
np.save(PIL.__version__ + ".npy", [
    Image.fromarray(picture).resize((224, 224), resample)
    for picture in (tall, tall[:96])
    for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)])
PYTHON
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet numpy==2.4.6
for version in 12.3.0 13.0.0; do
    venv/bin/pip install --quiet "pillow==$version"
    venv/bin/python resize.py
done
venv/bin/python - <<'PYTHON'
import sys

import numpy as np

old, new = (np.load(v + ".npy").astype(int) for v in ("12.3.0", "13.0.0"))
largest = abs(old - new).reshape(4, -1).max(axis=1).tolist()
print("largest difference: tall bilinear %d, tall bicubic %d, square %d and %d" % (*largest,))
sys.exit(largest != [1, 14, 0, 0])
PYTHON
