"""The picture of the README counts and draws what is in the masks."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import picture

SVG = "{http://www.w3.org/2000/svg}"


def _masks() -> tuple[np.ndarray, np.ndarray]:
    """Return two tiles' columns that share every other row, alternating and gathered."""
    after = np.zeros((40, 192), dtype=bool)
    after[::2, : 6 * picture.TILE] = after[1::2, 6 * picture.TILE :] = True
    order = np.arange(192).reshape(2, 96).T.ravel()
    return after[:, order], after


def test_shares_are_counted() -> None:
    before, after = _masks()
    assert picture.touched(before) == 1.0
    assert picture.touched(after) == 0.5


def test_runs_cover_the_mask() -> None:
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0]], dtype=bool)
    assert list(picture.runs(mask)) == ["M0 0h2v1h-2z", "M3 0h1v1h-1z"]


def test_the_picture_is_well_formed_and_says_the_shares() -> None:
    root = ElementTree.fromstring(picture.picture(*_masks(), "w"))
    texts = [node.text or "" for node in root.iter(f"{SVG}text")]
    assert "100%" in texts[0]
    assert "50%" in texts[1]


def test_the_committed_picture_is_one_of_ours() -> None:
    root = ElementTree.parse(Path(__file__).parents[1] / "docs" / "before_after.svg").getroot()
    assert root.tag == f"{SVG}svg"
    assert len(list(root.iter(f"{SVG}text"))) == 2
