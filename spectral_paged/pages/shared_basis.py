"""A calibration is the statistics of a model from which formats get shared bases and weights.

The statistics are the mean covariances of K and of V inside a block, and the costs of an error: the
second moments of the queries that meet a key, and of the output projection that a value passes. K
has three covariances, as formats store it: before RoPE, turned with its frame, and after RoPE. When
a format is bound, eigenvectors of a covariance, weighted or not, become the rows its pages share.

The file is `spectral_basis.safetensors`, every tensor fp32 `[layers, H, D, D]`:

```
k_pre, k_frame,    covariance within a block, page mean removed, every block of equal energy
k_post, v
q_pre, q_post      second moment of the queries as a key before (after) RoPE meets them
o                  second moment of the output projection's rows, by value dimension
metadata           version, model fingerprint, tokens seen
```
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectral_paged.errors import CorruptFileError, FormatError
from spectral_paged.file_limits import MAX_CALIBRATION_BYTES, check_file
from spectral_paged.kernels.seal.eigenvectors import eigenvectors
from spectral_paged.pages.decompose import band_vectors, fix_signs, leading_eigenvectors
from spectral_paged.pages.format import PageFormat
from spectral_paged.pages.sections import Bands

BASIS_VERSION = "2"
COVARIANCES, METRICS = ("k_pre", "k_frame", "k_post", "v"), ("q_pre", "q_post", "o")
# an error in a direction that no calibrated query has costs this share of the mean error
METRIC_FLOOR = 0.05


@dataclass(frozen=True, slots=True)
class SideRows:
    """K's or V's part of a bound basis; `[layers, H, ...]`, or `[N', ...]` after `of_layers`.

    Tokens x are weighted, `y = x weight`, and projected on orthonormal `vectors`. Coefficients
    multiply `rows = vectors inverse`, rounded to fp16 because kernels read them as fp16.
    """

    vectors: Tensor  # [.., rank, D]
    rows: Tensor  # [.., rank, D]
    weight: Tensor  # [.., D, D], symmetric: the root of the metric
    inverse: Tensor  # [.., D, D], of `weight`

    def of_layers(self, layers: Tensor) -> SideRows:
        """The rows of `layers` int64 `[N]`, heads flattened behind them: N' = N x H."""
        parts = (self.vectors, self.rows, self.weight, self.inverse)
        return SideRows(*(x[layers].flatten(0, 1) for x in parts))


def metric_root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of `metric` `[..., D, D]`, scaled to mean energy 1 and floored, and the
    root's inverse."""
    energy = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(metric / energy.clamp_min(1e-30))
    values = (values.clamp_min(0) + METRIC_FLOOR).sqrt().unsqueeze(-2)
    turned = vectors.transpose(-1, -2)
    return (vectors * values) @ turned, (vectors / values) @ turned


@dataclass(frozen=True, slots=True)
class BoundBasis:
    """A calibration's rows and weights for one format, on one device."""

    format: PageFormat
    k: SideRows
    v: SideRows

    def side(self, side: str) -> SideRows:
        return self.k if side == "k" else self.v

    def projections(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """The matrices from tokens of `layers` to coefficients, as arguments of `seal`.

        Both are fp32 `[L, H, D, rank]`, under `k_projection` and `v_projection`.
        """
        index = torch.tensor(list(layers), device=self.k.vectors.device)
        found = {}
        for name in "kv":
            rows = self.side(name)
            matrix = rows.vectors[index].transpose(-1, -2)
            if self.format.dim_weighting != "none":
                matrix = rows.weight[index] @ matrix
            found[f"{name}_projection"] = matrix.contiguous()
        return found


@dataclass(frozen=True, slots=True)
class SharedBasis:
    """The statistics of one model; the module's docstring lists the tensors."""

    k_pre: Tensor
    k_frame: Tensor
    k_post: Tensor
    v: Tensor
    q_pre: Tensor
    q_post: Tensor
    o: Tensor
    model_fingerprint: str
    num_tokens: int

    @property
    def id(self) -> str:
        """16 hex digits over every statistic; fingerprints of bound formats contain them."""
        digest = hashlib.sha256(self.model_fingerprint.encode())
        for name in COVARIANCES + METRICS:
            digest.update(getattr(self, name).contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, format: PageFormat) -> None:
        """Refuse a format that is bound to another calibration, or has another geometry.

        Raises:
            FormatError: names both.
        """
        _, heads, dim, _ = self.v.shape
        if (heads, dim) != (format.num_kv_heads, format.head_dim):
            raise FormatError(
                f"the calibration is of {heads} KV heads of width {dim}; format {format.name!r} "
                f"has {format.num_kv_heads} of {format.head_dim}: calibrate the model that runs"
            )
        if format.basis_id not in ("", self.id):
            raise FormatError(
                f"format {format.name!r} is bound to calibration {format.basis_id}, this one is "
                f"{self.id}: pass the calibration it was made with"
            )

    def bind(self, format: PageFormat, device: torch.device | str = "cpu") -> BoundBasis:
        """The rows that pages of `format` share, and the format with `basis_id` set.

        Eigenvectors are computed in fp64 on the CPU, so that they are the same on every device.

        Raises:
            FormatError: the format is bound to another calibration, or has another geometry.
        """
        self.check(format)
        dim = self.v.shape[-1]
        # a key turned with its frame meets queries from the same distances as one before RoPE
        keys, queries = {
            "pre": (self.k_pre, self.q_pre),
            "frame": (self.k_frame, self.q_pre),
            "post": (self.k_post, self.q_post),
        }[format.rope]

        def side(covariance: Tensor, metric: Tensor, bands: Bands) -> SideRows:
            metric = metric.double().cpu()
            if format.dim_weighting == "none":
                weight = inverse = torch.eye(dim).double().expand_as(metric)
            elif format.dim_weighting == "diagonal":
                weight, inverse = metric_root(torch.diag_embed(metric.diagonal(dim1=-2, dim2=-1)))
            else:
                weight, inverse = metric_root(metric)
            scaled = weight @ covariance.double().cpu() @ weight
            rank = sum(count for count, _ in bands)
            vectors = fix_signs(leading_eigenvectors(scaled, rank, eigenvectors))
            vectors = band_vectors(vectors, bands, format)
            parts = (vectors, (vectors @ inverse).half(), weight, inverse)
            return SideRows(*(x.float().to(device) for x in parts))

        return BoundBasis(
            replace(format, basis_id=self.id),
            side(keys, queries, format.k_bands),
            side(self.v, self.o, format.v_bands),
        )

    # ---- file ----------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the statistics to a safetensors file, by way of a temporary file beside it."""
        path, names = Path(path), COVARIANCES + METRICS
        tensors = {n: getattr(self, n).float().cpu().contiguous() for n in names}
        metadata = {
            "version": BASIS_VERSION,
            "id": replace(self, **tensors).id,
            "model_fingerprint": self.model_fingerprint,
            "num_tokens": str(self.num_tokens),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # processes may race
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, model_fingerprint: str | None = None
    ) -> SharedBasis:
        """Read a calibration from a file.

        Args:
            model_fingerprint: fingerprint of the model that will use it; None skips the check.

        Raises:
            CorruptFileError: the file is truncated, altered, or no calibration.
            FormatError: the calibration was made from another model.
        """
        path = Path(path)
        try:
            check_file(path, MAX_CALIBRATION_BYTES, "a calibration")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {n: file.get_tensor(n) for n in COVARIANCES + METRICS}
            fingerprint, num_tokens = metadata["model_fingerprint"], int(metadata["num_tokens"])
            version, named = metadata["version"], metadata["id"]
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CorruptFileError(
                f"{path} is no calibration or is damaged ({error}): make it again with "
                "`spectral-paged calibrate`"
            ) from error
        shape = tensors["v"].shape
        sound = len(shape) == 4 and shape[2] == shape[3] and version == BASIS_VERSION
        for tensor in tensors.values():
            sound &= tensor.shape == shape and tensor.dtype == torch.float32
            sound = sound and bool(torch.isfinite(tensor).all())
        if not sound:
            raise CorruptFileError(
                f"{path} has version {version!r} or tensors of a wrong shape or value; this "
                f"version reads {BASIS_VERSION!r}: make it again with `spectral-paged calibrate`"
            )
        basis = cls(**tensors, model_fingerprint=fingerprint, num_tokens=num_tokens)
        if basis.id != named:
            raise CorruptFileError(
                f"{path} is damaged: it says it is calibration {named}, its content is {basis.id}: "
                "make it again with `spectral-paged calibrate`"
            )
        if model_fingerprint is not None and fingerprint != model_fingerprint:
            raise FormatError(
                f"{path} was calibrated on a model with fingerprint {fingerprint}; this one has "
                f"{model_fingerprint} (files from before fingerprints were the same in every dtype "
                "have another one): run `spectral-paged calibrate` on the model that will use it"
            )
        return basis


class BasisAccumulator:
    """An accumulator sums a calibration's covariances, a batch of blocks at a time, in fp64.

    Each block's covariance is divided by its energy first, so that no block of large values decides
    the basis.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        shape = (num_layers, num_kv_heads, head_dim, head_dim)
        self._sums = {name: torch.zeros(shape).double() for name in COVARIANCES}
        self._num_tokens = 0

    def add(
        self,
        layers: Sequence[int],
        *,
        k_post: Tensor,
        v: Tensor,
        k_pre: Tensor | None = None,
        k_frame: Tensor | None = None,
    ) -> None:
        """Add blocks `[len(layers), H, T, D]`, one a layer; None adds nothing to that form of K."""
        sides = {"k_pre": k_pre, "k_frame": k_frame, "k_post": k_post, "v": v}
        for name, x in sides.items():
            if x is None:
                continue
            x = x.double()
            x = x - x.mean(dim=-2, keepdim=True)
            covariance = x.transpose(-1, -2) @ x
            energy = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            self._sums[name][list(layers)] += (covariance / energy.clamp_min(1e-30)).cpu()
        self._num_tokens += k_post.shape[-2] * len(layers)

    def finish(
        self, *, q_pre: Tensor, q_post: Tensor, o: Tensor, model_fingerprint: str
    ) -> SharedBasis:
        """The calibration from all blocks added, with the given metrics."""
        covariances = {name: x.float() for name, x in self._sums.items()}
        return SharedBasis(
            **covariances,
            q_pre=q_pre.float(),
            q_post=q_post.float(),
            o=o.float(),
            model_fingerprint=model_fingerprint,
            num_tokens=self._num_tokens // len(self._sums["v"]),
        )
