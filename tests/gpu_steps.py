"""Take --steps training steps of train.py's flags and print the device's line and their numbers;
under --graphs twice: with graphs, and with the same batches but none.

tests/test_gpu_path.py starts it on a pretended GPU.
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from engine.processes import World
from engine.settings import parse_arguments
from fast.graphs import Graphs

if __name__ == "__main__":
    config, _ = parse_arguments(None)
    world, sources = World(), train.prepare(config)
    train.losses.token_cross_entropy = functools.partial(  # in pieces, as at a large size
        train.losses.token_cross_entropy, piece=48)
    for most in (Graphs.MOST, 0)[:1 + config.graphs]:
        Graphs.MOST = most
        run = train.Run(config, sources, world)
        print(train.describe(run, "")[0])
        print(json.dumps([run.trainer.train_step(batch)
                          for batch in run.rows.batches(0)[:config.steps]]))
