"""FlashInfer's paged decode as a baseline of `bench decode`, where it is installed.

Each element type runs at its fastest page size, with plain or tensor-core kernels. Runs whose
output differs from the fp32 reference are not timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PAGE_TOKENS = (16, 32, 64)
WORKSPACE_BYTES = 256 << 20
# queries a KV head that FlashInfer's plain kernels are built for; others end the process
CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)
# element type, its name, and the largest relative error against fp32 over the stored elements
KINDS = ((torch.bfloat16, "bf16", 1e-2), (torch.float8_e4m3fn, "fp8", 2e-2))


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


class PagedBatch:
    """Random K and V of sequences in FlashInfer's pages, `[pages, 2, page, Hkv, D]`.

    Pages lie at random places; the tables are `indptr` `[N + 1]`, `indices` and the number of
    tokens in each last page.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int,
        dim: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        counts = [-(-n // page) for n in lengths]
        total = sum(counts)
        self.lengths, self.page = lengths, page
        shape = (total, 2, page, heads, dim)
        self.kv = torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
        ends = torch.tensor([0, *counts]).cumsum(0)
        last = [n - (c - 1) * page for n, c in zip(lengths, counts, strict=True)]
        self.indptr = ends.to(torch.int32).to(device)
        self.indices = torch.randperm(total).to(torch.int32).to(device)
        self.last = torch.tensor(last, dtype=torch.int32, device=device)

    def reference(self, q: Tensor, sequence: int) -> Tensor:
        """Attention output `[Hq, D]` in fp32 of one sequence's query `[Hq, D]`."""
        start, end = self.indptr[sequence : sequence + 2].tolist()
        pages = self.kv[self.indices[start:end].long()].float()
        k, v = pages.transpose(0, 1).flatten(1, 2)[:, : self.lengths[sequence]].transpose(1, 2)
        group = q.shape[0] // k.shape[0]
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        scores = (k @ q.float().unsqueeze(-1)).squeeze(-1) * q.shape[-1] ** -0.5
        return (scores.softmax(-1).unsqueeze(1) @ v).squeeze(1)


def planned(q: Tensor, batch: PagedBatch, tensor_cores: bool) -> Callable[[], Tensor]:
    """A call of FlashInfer's decode of `q` `[N, Hq, D]` over `batch`, planned in advance."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, kv_layout="NHD", use_tensor_cores=tensor_cores
    )
    wrapper.plan(
        batch.indptr,
        batch.indices,
        batch.last,
        q.shape[1],
        batch.kv.shape[3],
        q.shape[2],
        batch.page,
        q_data_type=q.dtype,
        kv_data_type=batch.kv.dtype,
    )

    def work() -> Tensor:
        found: Tensor = wrapper.run(q, batch.kv)
        return found

    return work


def best_ways(
    q: Tensor, lengths: Sequence[int], heads: int, time_ms: Callable[[Callable[[], Tensor]], float]
) -> Iterator[tuple[str, float, int]]:
    """`(name, ms, bytes read)` of each element type at its fastest correct run.

    FlashInfer refuses empty sequences, so a batch with one yields nothing.
    """
    if not installed() or min(lengths) < 1:
        return
    dim = q.shape[-1]
    for dtype, name, limit in KINDS:
        found: list[tuple[float, str]] = []
        for page in PAGE_TOKENS:
            batch = PagedBatch(lengths, heads, dim, page, dtype, q.device)
            for tensor_cores in (False, True):
                if not tensor_cores and q.shape[1] // heads not in CUDA_CORE_GROUPS:
                    continue
                how = f"pages of {page}{', tensor cores' if tensor_cores else ''}"
                try:
                    work = planned(q, batch, tensor_cores)
                    out = work()
                except (RuntimeError, ValueError) as refusal:
                    print(f"flashinfer {name}, {how}: refused ({str(refusal).splitlines()[0]})")
                    continue
                error = max(
                    float((out[i].float() - want).norm() / want.norm())
                    for i in {0, len(lengths) - 1}
                    for want in [batch.reference(q[i], i)]
                )
                if error > limit:
                    print(f"flashinfer {name}, {how}: error {error:.1e}, not timed")
                    continue
                found.append((time_ms(work), how))
        if found:
            ms, how = min(found)
            size = dtype.itemsize * 2 * heads * dim * sum(lengths)
            yield f"flashinfer {name}, {how}", ms, size
