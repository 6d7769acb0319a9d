"""All trainable parameters as one vector, with their optimizer."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch names them


class FlatParameters:
    """All trainable parameters as views of one vector `values`, their gradients as views of
    `grads`, so that optimizer step, clipping and all-reduce are one call each.  The variance
    vectors of L_MIM (`rho`) come last and learn at ten times the rate."""

    def __init__(self, model: nn.Module, lr: float):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        named.sort(key=lambda pair: pair[0].endswith(".rho"))  # stable: rho last
        self.values = torch.cat([p.detach().flatten() for _, p in named])
        self.grads = torch.zeros_like(self.values)
        self.shapes = {name: parameter.shape for name, parameter in named}
        values, grads = self.views(self.values), self.views(self.grads)
        for name, parameter in named:
            parameter.data, parameter.grad = values[name], grads[name]
        experts = sum(p.numel() for n, p in named if not n.endswith(".rho"))
        groups = []
        for place, rate in ((slice(0, experts), 1.0), (slice(experts, None), 10.0)):
            vector = nn.Parameter(self.values[place])
            vector.grad = self.grads[place]
            if len(vector):
                groups.append({"params": [vector], "lr": lr * rate, "rate": rate})
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector over all parameters as {name: view in that parameter's shape}."""
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {n: piece.view(shape) for (n, shape), piece in zip(self.shapes.items(), pieces)}

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; each group keeps its factor."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]

    def save(self, folder: Path) -> None:
        """Write model.safetensors and optimizer.safetensors, every tensor under its own name."""
        states = [self.optimizer.state[g["params"][0]] for g in self.optimizer.param_groups]
        moments = {f"{name}.": torch.cat([state[name] for state in states]) for name in MOMENTS}
        for file, vectors in (("model", {"": self.values}), ("optimizer", moments)):
            save_file({prefix + name: view.clone() for prefix, flat in vectors.items()
                       for name, view in self.views(flat.cpu()).items()},
                      folder / f"{file}.safetensors")

    def load_moments(self, folder: Path | None, step: int) -> list[Tensor]:
        """Restore Adam's moments as they were after `step` steps, and return them.  Without a
        folder they are zero: another process has read them and fills them in."""
        saved = folder and load_file(folder / "optimizer.safetensors",
                                     device=str(self.values.device))
        vectors = [group["params"][0] for group in self.optimizer.param_groups]
        for vector in vectors:
            self.optimizer.state[vector]["step"] = torch.tensor(float(step), device=vector.device)
        for moment in MOMENTS:
            flat = torch.cat([saved[f"{moment}.{name}"].flatten() for name in self.shapes]
                             if saved else [torch.zeros_like(self.values)])
            for vector, values in zip(vectors, flat.split(list(map(len, vectors)))):
                self.optimizer.state[vector][moment] = values.clone()
        return [self.optimizer.state[vector][moment] for vector in vectors for moment in MOMENTS]
