"""Page formats, their presets, and the codec between tensors and page bytes.

The package imports kernels; it imports neither pools nor sequences.
"""

from __future__ import annotations

from spectral_paged.pages.codec import (
    decode_pages,
    encode_pages,
)
from spectral_paged.pages.format import (
    PageFormat,
)
from spectral_paged.pages.presets import (
    AUTO,
    PRESETS,
)
from spectral_paged.pages.shared_basis import (
    BASIS_VERSION,
    BasisAccumulator,
    BoundBasis,
    SharedBasis,
)

__all__ = [
    "AUTO",
    "BASIS_VERSION",
    "BasisAccumulator",
    "BoundBasis",
    "PRESETS",
    "PageFormat",
    "SharedBasis",
    "decode_pages",
    "encode_pages",
]
