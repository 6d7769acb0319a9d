"""Run one training step of train.py's flags and keep its gradients in the file that --out names.

The tests start it alone and under torchrun, and compare what the processes computed together.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save_file

from engine.settings import parse_arguments
from engine.processes import World
import train

if __name__ == "__main__":
    config, _ = parse_arguments(None)
    world = World()
    world.join()
    run = train.Run(config, train.prepare(config), world)
    row = run.trainer.train_step(run.rows.batches(0)[0])
    if world.main:
        gradients = run.flat.views(run.flat.grads.cpu())
        gradients = {name: grad.clone() for name, grad in gradients.items()}
        save_file(gradients, config.out, metadata={"loss": repr(row["loss"])})
    world.leave()
