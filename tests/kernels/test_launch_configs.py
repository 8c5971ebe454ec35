"""Launches come from the table: the GPU's own entry, then its kind's, then the default."""

from __future__ import annotations

import pytest
import torch

from spectral_paged.kernels.launch import configs as launch_configs
from spectral_paged.kernels.launch.configs import DecodeConfig, SealConfig
from spectral_paged.pages import PRESETS, PageFormat
from support.kernel_cases import PAGES

DEVICE = torch.device("cpu")


def layout(name="quality-128"):
    dim, fields = PAGES[name]
    return PageFormat(name, 2, dim, **fields).layout


@pytest.fixture
def table(monkeypatch):
    found = {
        "A": {"decode": {"shared-frame-128-128-128": {"splits": 2}}},
        "sm_1": {
            "decode": {"shared-frame-128-128-128": {"splits": 6}, "page-frame-128-32-64": {}},
            "seal": {"shared-frame-128-128-128": {"warps": 8}},
        },
    }
    monkeypatch.setattr(launch_configs, "launch_table", lambda: found)
    monkeypatch.setattr(launch_configs, "gpus_of", lambda device: ("A", "sm_1"))


def test_a_gpus_own_entry_comes_before_that_of_its_kind(table):
    assert launch_configs.decode_config(layout(), DEVICE) == DecodeConfig(splits=2)
    assert launch_configs.seal_config(layout(), DEVICE) == SealConfig(warps=8)


def test_what_the_table_does_not_name_has_the_default(table):
    assert launch_configs.decode_config(layout("compact-128"), DEVICE) == DecodeConfig()
    assert launch_configs.decode_config(layout("int8-128"), DEVICE) == DecodeConfig()
    assert launch_configs.seal_config(layout("quality-64"), DEVICE) == SealConfig()


def test_the_table_that_is_shipped_names_cases_and_fields_that_exist():
    cases = {
        launch_configs.case_of(PageFormat.preset(p, num_kv_heads=1, head_dim=dim).layout)
        for p in PRESETS
        for dim in (64, 96, 128, 256)
        if p != "exact"
    }
    for ops in launch_configs.launch_table().values():
        for op, entries in ops.items():
            for case, fields in entries.items():
                assert case in cases
                {"decode": DecodeConfig, "seal": SealConfig}[op](**fields)


@pytest.mark.parametrize("rows", [0, 16, 128, 256])
def test_a_seal_takes_only_passes_that_were_compared(rows):
    with pytest.raises(ValueError, match=f"takes {rows} tokens at once; use 32 or 64"):
        SealConfig(rows=rows)
