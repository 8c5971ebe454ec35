"""A LoRA adapter in a folder that PEFT saved, read or refused by name.

```
adapter_config.json        rank, alpha, and what else was trained
adapter_model.safetensors  base_model.model.<layer>.lora_A.weight  [r, in]
                           base_model.model.<layer>.lora_B.weight  [out, r]
```
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spectral_paged.errors import AdapterError, SpectralPagedError, cut, shown
from spectral_paged.file_limits import MAX_CONFIG_BYTES, check_file
from spectral_paged.models.lora.adapter_weights import AdapterWeights, LayerAdapter

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGE = "merge it into the model (peft: merge_and_unload) and serve what comes of it"
# field of PEFT's config -> what it means where it is set
NOT_SERVED = {
    "use_dora": "it is a DoRA adapter, which scales the weights of the base",
    "lora_bias": "its B has a bias",
    "modules_to_save": "it replaces whole modules of the base",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no linear layers",
    "trainable_token_indices": "it changes embeddings of tokens",
    "use_qalora": "it is a QA-LoRA adapter, which pools its inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it is an aLoRA adapter, which begins inside of a prompt",
    "monteclora_config": "it is a MonteCLoRA adapter",
    "kasa_config": "it is a KaSA adapter",
    "velora_config": "it is a VeLoRA adapter",
    "arrow_config": "it chooses among other adapters for each token",
}
# initialisations that leave the base as it is; others (PiSSA, OLoRA, ...) change its weights
KEEP_THE_BASE = ("gaussian", "orthogonal", "eva")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def check_folder(name: str, path: str, max_lora_rank: int) -> dict[str, Any]:
    """Return the config of an adapter in a folder, or refuse it before tensors are read.

    Raises:
        AdapterError: there is no adapter, a file cannot be read, or what it is is not served.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise AdapterError(
            f"adapter {shown(name)}: there is no folder {shown(path)}: fetch it first (`hf "
            "download NAME --local-dir FOLDER`) and name the folder"
        )
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"adapter {shown(name)}: folder {shown(path)} has no {CONFIG}: name the folder that "
            "PEFT's save_pretrained wrote"
        )
    try:
        check_file(folder / CONFIG, MAX_CONFIG_BYTES, "a config")
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, SpectralPagedError) as error:
        raise AdapterError(
            f"adapter {shown(name)}: {CONFIG} in {shown(path)} cannot be read "
            f"({cut(str(error))}): fetch it again"
        ) from error
    check_config(name, config, max_lora_rank)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / PICKLE).is_file()
        raise AdapterError(
            f"adapter {shown(name)}: folder {shown(path)} has no {WEIGHTS}"
            + (
                f", but a {PICKLE}, whose code would run: load it with PEFT, and save it with "
                "save_pretrained"
                if pickled
                else ": fetch it again"
            )
        )
    return config


def check_config(name: str, config: Mapping[str, Any], max_lora_rank: int) -> None:
    """Refuse an adapter by its PEFT config.

    Raises:
        AdapterError: the message says what is not served, and what to do.
    """
    kind = config.get("peft_type")
    kind = str(getattr(kind, "value", kind))
    if kind != "LORA":
        raise AdapterError(
            f"adapter {shown(name)} is of type {shown(kind)}, and LORA is served: {MERGE}"
        )
    for field, what in NOT_SERVED.items():
        if config.get(field):
            raise AdapterError(
                f"adapter {shown(name)} has {field} {shown(config[field])}: {what}, which is not "
                f"served: {MERGE}"
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"adapter {shown(name)} has bias {shown(config['bias'])}: it changes biases of the "
            f"base, which is not served: {MERGE}"
        )
    begins = config.get("init_lora_weights", True)
    if isinstance(begins, str) and begins not in KEEP_THE_BASE:
        raise AdapterError(
            f"adapter {shown(name)} has init_lora_weights {shown(begins)}, which changed the "
            "weights of the base: save it with PEFT's path_initial_model_for_weight_conversion, "
            f"or {MERGE}"
        )
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise AdapterError(
            f"adapter {shown(name)} has ranks {shown(ranks)}, which are no integers above 0: fetch "
            "its config again"
        )
    alphas = config.get("alpha_pattern") or {}
    wrong = [a for a in (config.get("lora_alpha"), *alphas.values()) if not _is_number(a)]
    if wrong or not all(map(_is_pattern, alphas)):
        raise AdapterError(
            f"adapter {shown(name)} has lora_alpha {shown(config.get('lora_alpha'))} and "
            f"alpha_pattern {shown(alphas)}, which are no numbers by names: fetch its config again"
        )
    check_rank(name, max(ranks), max_lora_rank)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def check_rank(name: str, rank: int, max_lora_rank: int) -> None:
    """Refuse an adapter of too high a rank.

    Raises:
        AdapterError: it is more than `max_lora_rank`.
    """
    if rank > max_lora_rank:
        raise AdapterError(
            f"adapter {shown(name)} has rank {rank}, and max_lora_rank is {max_lora_rank}: give "
            f"max_lora_rank={rank}"
        )


def read_folder(name: str, path: str, max_lora_rank: int) -> AdapterWeights:
    """Read an adapter; its tensors are on the CPU.

    Raises:
        AdapterError: as `check_folder`, or its tensors are damaged or are not of LoRA alone.
    """
    config = check_folder(name, path, max_lora_rank)
    pairs: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(Path(path).expanduser() / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (the file is no mapping)
                match = _TENSOR.fullmatch(key)
                if match is None:
                    raise AdapterError(
                        f"adapter {shown(name)} has tensor {shown(key)}, and A and B of linear "
                        f"layers are served: {MERGE}"
                    )
                pairs.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"adapter {shown(name)}: {WEIGHTS} in {shown(path)} cannot be read "
            f"({cut(str(error))}): fetch it again"
        ) from error
    layers = {}
    for where, pair in pairs.items():
        if len(pair) < 2:
            raise AdapterError(
                f"adapter {shown(name)} has one of A and B in {where}: fetch it again"
            )
        scale = scale_of(config, where, len(pair["A"]))
        layers[where] = LayerAdapter(pair["A"], pair["B"], scale)
    weights = AdapterWeights.of(name, layers)
    check_rank(name, weights.rank, max_lora_rank)
    return weights


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the factor of B A in a layer: alpha over the rank, or over its root (rsLoRA)."""
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        # as PEFT reads them: the end of a name, which may have a regular expression in it
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = own
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
