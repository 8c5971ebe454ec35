"""Pages inside vLLM: its scheduler, model, sampler and server, over `SpectralKVCache`.

```
vllm.LLM(model, **engine_args(kv_format="auto"))
vllm serve $(spectral-paged vllm-args MODEL)
```

The cache is the block manager. vLLM keeps every decision about requests; the cache keeps every byte
of K and V and every decision about bytes. vLLM's own pool holds one small block a request, as a
name. For one GPU, vLLM runs scheduler and worker in one process and one thread, so both use one
cache object (`PagedRuntime`).

```
SpectralScheduler.schedule            SpectralKVCacheManager    add_sequence, try_reserve, free
SpectralWorker.execute_model          SpectralModelState        begin_step; static inputs of graphs
  a layer's attention                 SpectralAttention         attend
  after sampling                      SpectralModelState        end_step
```

This package imports vLLM only in the modules that vLLM itself loads.
"""

from spectral_paged.integrations.vllm.options import (
    PageOptions,
    engine_args,
    serve_flags,
)
from spectral_paged.integrations.vllm.releases import (
    check_release,
    register,
)

__all__ = [
    "PageOptions",
    "check_release",
    "engine_args",
    "register",
    "serve_flags",
]
