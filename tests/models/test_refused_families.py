"""Every causal language model of the pinned transformers is served, or refused with its limit."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spectral_paged.errors import UnsupportedModelError
from spectral_paged.models.geometry import FAMILIES, ModelGeometry
from spectral_paged.models.refused_families import LIMITS, limit_of
from support.paths import ROOT

PINNED = re.search("^transformers==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[1]
REFUSED = [family for families in LIMITS.values() for family in families]


@pytest.mark.skipif(version("transformers") != PINNED, reason=f"the list is of {PINNED}")
def test_every_family_of_transformers_is_served_or_refused_once():
    """A new release of transformers brings families, which this names."""
    ours = Counter((*FAMILIES, *REFUSED))
    assert set(ours) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(ours.values()) == {1}
    assert set(FAMILIES) <= set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("family", REFUSED)
def test_a_refusal_names_the_family_its_limit_and_what_is_served(family):
    limit = limit_of(family)
    assert limit is not None and family in LIMITS[limit]
    with pytest.raises(UnsupportedModelError) as caught:
        ModelGeometry.from_config(SimpleNamespace(model_type=family))
    message = str(caught.value)
    assert f"'{family}' is not supported ({limit})" in message
    assert message.endswith("take a model of one of them") and FAMILIES[-1] in message


def test_a_family_that_nobody_lists_is_refused_without_a_limit():
    with pytest.raises(UnsupportedModelError, match=r"'new' is not supported; .*take a model of"):
        ModelGeometry.from_config(SimpleNamespace(model_type="new"))


def test_the_manual_has_every_family_beside_its_limit():
    rows = {}
    for line in (ROOT / "docs" / "families.md").read_text("utf-8").splitlines():
        if line.startswith("| ") and line.count("|") == 3:
            names, what = (cell.strip() for cell in line.strip("|").split("|"))
            rows[what] = set(re.split(r", ", names))
    for limit, families in LIMITS.items():
        assert rows.get(limit) == set(families), limit
    served = {name for what, names in rows.items() if what not in LIMITS for name in names}
    assert set(FAMILIES) <= served
