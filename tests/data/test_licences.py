"""Licences: what each obliges, in one plain sentence, and help with names that are not SPDX."""

from __future__ import annotations

import pytest

from fourscore.data.licences import NOT_LEGAL_ADVICE, obligations
from fourscore.files import FourscoreError


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("MIT", ["copyright notice"]),
        ("BSD-3-Clause", ["copyright notice"]),
        ("Apache-2.0", ["copyright notice", "NOTICE"]),
        ("CC0-1.0", ["No conditions"]),
        ("CC-BY-4.0", ["Name the source"]),
        ("cc-by-sa-3.0", ["Name the source", "share alike"]),
        ("CC-BY-SA-4.0", ["Name the source", "share alike"]),
        ("CC-BY-NC-SA-4.0", ["Name the source", "No commercial use", "share alike"]),
        ("CC-BY-NC-ND-4.0", ["Name the source", "No commercial use", "changed versions"]),
        ("CC-BY-NC-2.0", ["Name the source", "No commercial use"]),
        ("ODC-By-1.0", ["Name the source"]),
        ("ODbL-1.0", ["Name the source", "ODbL"]),
        ("GPL-3.0-only", ["copyright notice", "same licence"]),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["copyright notice", "same licence"]),
        ("LicenseRef-own", ["Your own data"]),
        ("LicenseRef-supplier-contract", ["Read the text of LicenseRef-supplier-contract"]),
        ("MIT AND CC-BY-NC-4.0", ["copyright notice", "Name the source", "No commercial use"]),
    ],
)
def test_a_licence_says_what_it_obliges(licence: str, words: list[str]):
    *sentences, last = obligations(licence)
    assert last == NOT_LEGAL_ADVICE
    assert len(sentences) == len(words)
    for sentence, word in zip(sentences, words):
        assert word in sentence


def test_or_leaves_a_choice():
    assert "MIT: Keep" in obligations("MIT OR CC-BY-NC-4.0")[0]
    assert "Or: CC-BY-NC-4.0: Name" in obligations("MIT OR CC-BY-NC-4.0")[0]


def test_unknown_obliges_nothing_that_could_be_said():
    assert obligations(None) == []


@pytest.mark.parametrize(
    ("licence", "near"), [("CC BY-SA 4.0", "CC-BY-SA-4.0"), ("apache2", "Apache-2.0"), ("BSD", "BSD"), ("(MIT", "MIT")]
)
def test_what_is_not_spdx_gets_near_names(licence: str, near: str):
    with pytest.raises(FourscoreError, match="is not an SPDX licence expression") as caught:
        obligations(licence)
    assert near in caught.value.todo


def test_what_is_nothing_at_all_gets_the_name_for_own_data():
    with pytest.raises(FourscoreError, match="LicenseRef-own"):
        obligations("ours, all rights")
