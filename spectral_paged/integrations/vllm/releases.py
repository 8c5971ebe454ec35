"""The releases of vLLM that were tried, and the entry point that vLLM loads in every process."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from spectral_paged.errors import MissingPackageError
from spectral_paged.integrations.vllm.options import BACKEND

TRIED = ("0.26.0",)


def check_release() -> None:
    """Refuse a vLLM that this package was not tried with.

    The classes that pages replace are private to vLLM and change between its releases.

    Raises:
        MissingPackageError: vLLM is not installed, or of another release.
    """
    tried = ", ".join(TRIED)
    try:
        found = version("vllm")
    except PackageNotFoundError:
        raise MissingPackageError(
            f"pages inside vLLM need vLLM {tried}: pip install 'vllm=={TRIED[-1]}'"
        ) from None
    if found.partition("+")[0] not in TRIED:
        raise MissingPackageError(
            f"vLLM {found} is installed; pages inside vLLM were tried with {tried}, and replace "
            f"classes that may differ in others: pip install 'vllm=={TRIED[-1]}'"
        )


def register() -> None:
    """Register the attention backend; the entry point `vllm.general_plugins` calls it.

    It may run more than once, in every process of vLLM. It registers a name only, so another
    release of vLLM runs undisturbed until that name is chosen (`check_release`).
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
