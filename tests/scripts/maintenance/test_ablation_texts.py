"""Ablations: texts that are not those of the runs that are kept."""

import pytest

from scripts.maintenance.ablation_texts import check_texts

KEPT = [
    {"settings": {"corpus": text}, "start": {"fingerprint": {"data": data}}}
    for text, data in (("board", "a1"), ("reference", "b2"), ("reference", "b2"))
]


def test_a_text_of_another_version_is_refused():
    with pytest.raises(ValueError, match=r"data/reference: .*c3.*b2.*botocore 1\.44\.8"):
        check_texts({"board": "a1", "reference": "c3"}, KEPT)


def test_the_same_text_and_one_never_trained_on_are_taken():
    check_texts({"board": "a1", "reference": "b2", "own": "d4"}, KEPT)
