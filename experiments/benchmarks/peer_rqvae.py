"""The RQ-VAE's training step with PyTorch and vector-quantize-pytorch, for `experiments.benchmarks.quantizers`.

Run by the Python that has both installed. For every line on stdin that names a quantizer it trains that many steps and
answers with the seconds they took: `ema 20` -> `1.25`; `matmul 20` -> GFLOP/s of the first layer's product.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from vector_quantize_pytorch import ResidualVQ

WIDTHS = (768, 512, 256, 128, 32)
ITEMS, BATCH = 65_536, 2048
QUANTIZERS = {
    "ema": {},  # its default: moving averages, rotation trick
    "gradient": {"learnable_codebook": True, "ema_update": False, "rotation_trick": False},
}


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def make_step(**options: bool) -> Callable[[], None]:
    """A training step on random rows: gather, both passes, fused AdamW. Unlike semid's, it clips no gradient."""
    encoder, decoder = _mlp(WIDTHS), _mlp(WIDTHS[::-1])
    quantizer = ResidualVQ(dim=WIDTHS[-1], num_quantizers=3, codebook_size=256, commitment_weight=0.25, **options)
    modules = nn.ModuleList([encoder, quantizer, decoder])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    table = torch.randn(ITEMS, WIDTHS[0])
    with torch.no_grad():  # codebooks where the latents are
        latents = encoder(table[: 3 * 256]).reshape(3, 256, -1)
        for layer, book in zip(quantizer.layers, latents, strict=True):
            layer._codebook.embed.data.copy_(book[None])
            if hasattr(layer._codebook, "embed_avg"):
                layer._codebook.embed_avg.data.copy_(book[None])

    def step() -> None:
        x = table[torch.randint(ITEMS, (BATCH,))]
        quantized, _, losses = quantizer(encoder(x))
        loss = (decoder(quantized) - x).square().mean() + losses.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def matmul_rate(repeats: int) -> float:
    a, b = torch.randn(BATCH, WIDTHS[0]), torch.randn(WIDTHS[0], WIDTHS[1])
    started = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * BATCH * WIDTHS[0] * WIDTHS[1] / (time.perf_counter() - started) / 1e9


def main() -> None:
    torch.manual_seed(0)
    steps = {name: make_step(**options) for name, options in QUANTIZERS.items()}
    for line in sys.stdin:
        what, number = line.split()
        if what == "matmul":
            print(matmul_rate(int(number)), flush=True)
            continue
        started, used = time.perf_counter(), time.process_time()
        for _ in range(int(number)):
            steps[what]()
        print(time.perf_counter() - started, time.process_time() - used, flush=True)


if __name__ == "__main__":
    main()
