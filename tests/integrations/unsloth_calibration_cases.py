"""Calibration of Unsloth's models by Unsloth's own attention; `test_unsloth.py` runs this file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.unsloth import patch_unsloth_attention
from spectral_paged.integrations.unsloth.families import FAMILIES
from spectral_paged.models import calibration
from spectral_paged.pages import SharedBasis
from spectral_paged.pages.shared_basis import COVARIANCES, METRICS
from support.unsloth_checkpoints import adapters, batch, checkpoint, decode_logits, distance
from support.unsloth_on_cpu import functions_now, load

pytest_plugins = ["support.unsloth_on_cpu"]
FAST = [name for name, family in FAMILIES.items() if family.is_fast]
WITHOUT_UNSLOTH = """
import sys; from pathlib import Path
sys.path.append(sys.argv[1])
import torch
from letters import Letters
from transformers import AutoModelForCausalLM
from spectral_paged.models.calibration import builtin_text, calibrate
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.models.loader import LoadedModel
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = LoadedModel("t", model, Letters(), ModelGeometry.from_config(model.config))
    calibrate(loaded, [builtin_text()], max_spans=1).save(folder / "basis.safetensors")
"""


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % 190 for letter in text]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of all families, each beside the calibration that transformers' model gives."""
    root = tmp_path_factory.mktemp("calibrated")
    found = {family: checkpoint(root / family, family) for family in FAST}
    source = Path(__file__).read_text(encoding="utf-8")
    letters = source[source.index("class Letters") : source.index("@pytest.fixture")]
    (root / "letters.py").write_text(letters, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_UNSLOTH, root, *found.values()],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "DEFAULT_SPANS", 1)


def served(folder):
    model = load(folder)
    model._saved_temp_tokenizer = Letters()
    return model


def basis_of(model):
    """What a patch of `model` keeps in the cache folder."""
    options = {"kv_format": "spectral-quality", "kv_cache_bytes": 16 << 20, "max_num_seqs": 2}
    patch_unsloth_attention(model, verbose=False, **options).undo()
    [kept] = (calibration.cache_folder() / "calibrations").iterdir()
    return SharedBasis.load(kept)


@pytest.mark.parametrize("family", FAST)
def test_unsloths_attention_is_calibrated_as_transformers_is(family, folders):
    model, before = served(folders[family]), functions_now()
    model.train()
    found = basis_of(model)
    assert model.training and functions_now() == before
    want = SharedBasis.load(folders[family] / "basis.safetensors")
    assert found.model_fingerprint == want.model_fingerprint
    assert found.num_tokens == want.num_tokens > 1000
    for name in COVARIANCES + METRICS:
        assert distance(getattr(found, name), getattr(want, name)) < 1e-3, name


def test_a_calibration_is_of_the_weights_below_adapters(folders):
    model = served(folders["llama"])
    want, layers = basis_of(model), model.model.layers
    plain = model(input_ids=torch.arange(3, 50)[None], use_cache=False).logits
    model = adapters(model)
    changed = model(input_ids=torch.arange(3, 50)[None], use_cache=False).logits
    assert distance(changed, plain) > 0.01
    (calibration.cache_folder() / "calibrations").rename(calibration.cache_folder() / "kept")
    found = basis_of(model)
    assert model.get_base_model().model.layers is layers
    for name in COVARIANCES:
        assert distance(getattr(found, name), getattr(want, name)) < 1e-5, name


def test_the_default_format_is_calibrated_and_answers(folders, patched):
    model, inputs = served(folders["llama"]), batch([40, 1300])
    tokens = torch.randint(3, 190, (2, 6), generator=torch.Generator().manual_seed(1))
    logits = decode_logits(model, inputs, tokens)
    patch = patched(model, prefill_segment=512)
    found = decode_logits(model, inputs, tokens)
    stats = patch.stats()
    assert stats["format"] == "spectral-quality" and stats["pages_attended"] > 0
    assert distance(found, logits) < 0.3
    patch.undo()


def test_quantized_weights_are_refused_and_nothing_stays_patched(folders):
    model, before = served(folders["llama"]), functions_now()
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = torch.nn.Parameter(
        torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(InvalidRequestError, match=r"quantized \(torch.uint8\).*spectral-int8"):
        basis_of(model)
    assert functions_now() == before
