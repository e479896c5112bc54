"""Dropout whose draws cost little on a CPU.

PyTorch 2.13 decides about one entry after the other (on an AMD processor, at least):
that was an eighth of a client's float32 step on MiniLM's sub-FM.
"""

import torch
from torch import Tensor, nn

# Entries are decided by 16 random bits each, so p is a multiple of 1 / LEVELS.
LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """Zero each entry with probability p, and scale the others by 1 / (1 - p).

    Is `torch.nn.Dropout`, but on a CPU, in training: there it draws otherwise, p is
    rounded to 16 bits, and must be less than 1 even so.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the entries that are kept, scaled; in evaluation all as they are."""
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        dropped, count = round(self.p * LEVELS), input.numel()
        draws = torch.empty((count + 3) // 4, dtype=torch.int64)
        draws.random_(-(1 << 63), None)  # all 64 bits of each
        fates = draws.view(torch.int16)[:count].view(input.shape)
        kept = fates >= dropped - LEVELS // 2
        return input * kept.to(input.dtype).mul_(LEVELS / (LEVELS - dropped))


def replace_dropout(modules: nn.ModuleDict) -> None:
    """Let modules drop out by `Dropout` where PyTorch's did, in place."""
    for name, module in modules.items():
        if type(module) is nn.Dropout:
            modules[name] = Dropout(module.p)
