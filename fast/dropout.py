"""Dropout whose mask comes from random 64-bit words on a CPU."""

import torch
from torch import Tensor, nn


def word_dropout(x: Tensor, p: float) -> Tensor:
    """x with each element 0 with probability p, else x / (1 - p).

    p is rounded to a multiple of 2^-16: one random 64-bit word serves four elements, which takes a
    third of the time of the Bernoulli draws of F.dropout. Autograd keeps one byte per element."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2 ** 63, None)
    draws = words.view(torch.int16)[:x.numel()].view(x.shape)  # uniform in -2^15 .. 2^15 - 1
    least = min(round(p * 2 ** 16), 2 ** 16 - 1) - 2 ** 15  # of the draws that keep an element
    return (x * (1 / (1 - p))).masked_fill(draws < least, 0)


class WordDropout(nn.Dropout):
    """nn.Dropout by word_dropout, in training on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or not 0 < self.p < 1:
            return super().forward(x)
        return word_dropout(x, self.p)


FORMS = {nn.Dropout: WordDropout}
