"""GPUs by compute capability, and the code as it would run on them; none is needed."""

from __future__ import annotations

import sys

from spectral_paged.kernels.launch import card as card_module
from spectral_paged.kernels.launch.card import Card

KIB = 1024
# The most shared memory that a program may have, from the CUDA programming guide ("Technical
# Specifications per Compute Capability"), and GPUs of each kind.
CARDS = {
    "sm_75": Card("T4", (7, 5), 64 * KIB),
    "sm_80": Card("A100", (8, 0), 163 * KIB),
    "sm_86": Card("RTX 3090", (8, 6), 99 * KIB),
    "sm_89": Card("RTX 4090", (8, 9), 99 * KIB),
    "sm_90": Card("H100", (9, 0), 227 * KIB),
    "sm_100": Card("B200", (10, 0), 227 * KIB),
    "sm_120": Card("RTX 5090", (12, 0), 99 * KIB),
}
SOLD_AS = {
    "sm_75": "T4, RTX 20",
    "sm_80": "A100, A30",
    "sm_86": "RTX 30, A10, A40, RTX A6000",
    "sm_89": "RTX 40, L4, L40S",
    "sm_90": "H100, H200, GH200",
    "sm_100": "B200, GB200",
    "sm_120": "RTX 50, RTX PRO 6000 Blackwell",
}


def stand_on(card, setattr=setattr):
    """Let every module that asks for the GPU find `card`, on whatever device; None: a CPU.

    `setattr` is that of a monkeypatch, where it is undone."""

    def card_of(device):
        return card

    known = card_module.card_of
    for module in list(sys.modules.values()):
        if vars(module).get("card_of") is known:
            setattr(module, "card_of", card_of)
