"""Conversion of a GGUF file to a transformers folder, found again by the file's content."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from spectral_paged.errors import CorruptFileError, UnsupportedModelError, shown
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.gguf.architectures import ARCHITECTURES, Architecture, common_config
from spectral_paged.models.gguf.file import GGUFFile
from spectral_paged.models.gguf.keys import REMEDY, Keys
from spectral_paged.models.gguf.tokenizer import build_tokenizer, check_tokenizer
from spectral_paged.models.gguf.vocabulary import Vocabulary
from spectral_paged.models.gguf.weights import check_tensors, write_weights
from spectral_paged.models.kept_files import (
    CONVERTER_VERSION,
    cache_folder,
    conversions,
    read_manifest,
    scratch_folder,
    write_manifest,
)

logger = logging.getLogger(__name__)

SAMPLING = {  # `general.sampling` key of a file -> generation config
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def convert_gguf(path: Path) -> Path:
    """The folder with the converted model and tokenizer of a GGUF file, written on first use.

    A conversion is found by the file's content and the converter's version. The content is hashed
    again only where the file's size, times or place on the disk changed.

    Raises:
        CorruptFileError: the file is not GGUF, is damaged, or lacks keys or tensors.
        UnsupportedModelError: a key or tensor would not be honoured; the message names it.
    """
    path = Path(path).resolve()
    identity = _identity(path)
    if (known := _by_identity(identity)) is not None:
        return known
    digest = hashlib.sha256(b"%d/" % CONVERTER_VERSION)
    with open(path, "rb") as source:
        digest.update(hashlib.file_digest(source, "sha256").digest())
    target = cache_folder() / f"{path.stem}-{digest.hexdigest()[:16]}"
    manifest = {
        "source": str(path),
        "num_bytes": path.stat().st_size,
        "version": CONVERTER_VERSION,
        "identity": identity,
    }
    if (target / "config.json").exists():  # the same content in another place
        write_manifest(target, manifest)
        return target
    file = GGUFFile(path)
    plan = read_plan(file)
    logger.info("converting %s to safetensors in %s (once)", path, target)
    scratch = scratch_folder()
    try:
        write_model(file, plan, scratch)
        write_manifest(scratch, manifest)
        os.replace(scratch, target)
    except OSError:
        if not (target / "config.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@dataclass(frozen=True, slots=True)
class Plan:
    """The config, vocabulary and tensor names of a conversion, once every key was understood."""

    architecture: Architecture
    vocabulary: Vocabulary
    config: Any
    generation_config: GenerationConfig
    targets: dict[str, str]


def read_plan(file: GGUFFile) -> Plan:
    """Use every key and tensor of a file, or refuse the file.

    Raises:
        CorruptFileError: a key or tensor is missing or contradicts others.
        UnsupportedModelError: a key or tensor would not be honoured; the message names it.
    """
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise UnsupportedModelError(
            f"{file.path} holds no model (general.type is {shown(kind)}): take the model's own file"
        )
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: general.architecture is {shown(name)}; GGUF files of "
            f"{', '.join(ARCHITECTURES)} are read: take a GGUF file of a family that is served, or "
            "the model's safetensors folder"
        )
    architecture, keys = ARCHITECTURES[name], Keys(file.path, file.metadata, f"{name}.")
    _check_split(file, keys)
    vocabulary = Vocabulary.read(keys)
    known = common_config(file, keys, len(vocabulary.tokens))
    known |= architecture.config(file, keys, known)
    sampling = _sampling(keys)
    keys.finish()
    special = {
        "bos_token_id": vocabulary.ids.get("bos"),
        "eos_token_id": list(vocabulary.ends) or None,
        "pad_token_id": vocabulary.ids.get("padding"),
    }
    try:
        config = AutoConfig.for_model(**known, **special)
    except Exception as error:  # transformers checks values, each class in its own way
        raise UnsupportedModelError(
            f"{file.path}: transformers makes no {known['model_type']} of its keys "
            f"({' '.join(str(error).split()):.200}): {REMEDY}"
        ) from error
    ModelGeometry.from_config(config)  # refuses what the cache does not serve
    generation = GenerationConfig(**special, **sampling)
    return Plan(
        architecture, vocabulary, config, generation, check_tensors(file, architecture, config)
    )


def write_model(file: GGUFFile, plan: Plan, folder: Path) -> None:
    """Write tokenizer, weights, generation config and, last, config, which marks it complete."""
    config = plan.config
    tokenizer = build_tokenizer(file.path, plan.vocabulary)
    tokenizer.save_pretrained(folder)
    kept = PreTrainedTokenizerFast.from_pretrained(folder)
    check_tokenizer(file.path, plan.vocabulary, kept)
    config.dtype = write_weights(file, plan.architecture, config, plan.targets, folder)
    config.architectures = [_class_name(config)]
    plan.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)


def _class_name(config: Any) -> str:
    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)


def _check_split(file: GGUFFile, keys: Keys) -> None:
    """Refuse a file that is one part of several.

    Raises:
        CorruptFileError: the message names the part, and the numbers of its and of all tensors.
    """
    parts = keys.integer("split.count", 0)
    part = keys.integer("split.no", 0)
    wanted = keys.integer("split.tensors.count", len(file.tensors))
    if parts > 1 or wanted != len(file.tensors):
        raise CorruptFileError(
            f"{file.path} is part {part + 1} of {max(parts, 1)}, with {len(file.tensors)} of "
            f"{wanted} tensors: join all parts (llama-gguf-split --merge FIRST OUT) and take the "
            "file that comes of it"
        )


def _sampling(keys: Keys) -> dict[str, Any]:
    """The sampling values that the file asks for, under transformers' names."""
    found: dict[str, Any] = {}
    for name, to in SAMPLING.items():
        key = f"general.sampling.{name}"
        if key in keys:
            found[to] = keys.integer(key) if name == "top_k" else keys.number(key)
    return found | ({"do_sample": True} if found else {})


def _identity(path: Path) -> list[int]:
    """Numbers of a file's `stat` that change whenever it is written or replaced."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _by_identity(identity: list[int]) -> Path | None:
    """The conversion of the file with this identity; None where there is none."""
    for folder in conversions():
        if read_manifest(folder).get("identity") == identity:
            return folder
    return None
