"""The landscape: decoder directions on a plane."""

import json
import math
from pathlib import Path

import pytest
import torch

from safesail.release.landscape import in_words, landscape, pca
from safesail.repository import read_table


def directions(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def test_pca_by_hand():
    """Four unit vectors about zero: the first coordinate varies by 4 · 0.64, the second by 4 · 0.36."""
    unit = torch.tensor([[0.8, 0.6], [-0.8, 0.6], [0.8, -0.6], [-0.8, -0.6]], dtype=torch.float64)
    points, facts = pca(unit)
    torch.testing.assert_close(points, unit)
    assert facts == {"method": "PCA", "shares": [0.64, 0.36]}


def test_only_the_direction_counts_and_the_larger_range_becomes_minus_one_to_one():
    found = landscape(directions([8, 6, 0], [-0.4, 0.3, 0], [1.6, -1.2, 0], [-4, -3, 0]), seed=0)
    assert found.places == [(1.0, 0.75), (-1.0, 0.75), (1.0, -0.75), (-1.0, -0.75)]
    assert found.facts == {"method": "PCA", "shares": [0.64, 0.36], "n_neurons": 4}


def test_the_plane_is_not_mirrored_by_the_order_of_the_neurons():
    rows = list(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))
    there, back = landscape(rows, 0).places, landscape(rows[::-1], 0).places[::-1]
    for a, b in zip(there, back, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_neurons_that_write_alike_lie_near_each_other():
    chance = torch.Generator().manual_seed(1)
    centres = torch.eye(3, 20) * 5
    rows = [centres[i % 3] + 0.3 * torch.randn(20, generator=chance) for i in range(30)]
    places = [place or (math.nan, math.nan) for place in landscape(rows, 0).places]
    same = max(math.dist(places[i], places[j]) for i in range(30) for j in range(i) if (i - j) % 3 == 0)
    other = min(math.dist(places[i], places[j]) for i in range(30) for j in range(i) if (i - j) % 3)
    assert same < other


def test_directions_of_another_width_are_left_out_and_too_few_make_no_plane():
    found = landscape(directions([1, 0], [0, 1], [1, 1], [1, 0, 0]), seed=0)
    assert [place is None for place in found.places] == [False, False, False, True]
    assert found.facts["n_neurons"] == 3
    for few in ([], directions([1, 0], [0, 1]), directions([1, 0], [0, 1], [1, 0, 0], [0, 1, 0])):
        found = landscape(few, seed=0)
        assert found.places == [None] * len(few)
        assert found.facts == {"method": "none", "n_neurons": 0}
        assert in_words(found.facts) == ""


def test_equal_directions_lie_in_the_middle():
    assert landscape(directions([1, 0], [2, 0], [3, 0]), seed=0).places == [(0.0, 0.0)] * 3


def test_umap_is_used_where_it_is_installed_and_is_the_same_every_time():
    pytest.importorskip("umap")
    rows = list(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    first = landscape(rows, seed=3)
    assert first.facts == {"method": "UMAP", "n_neighbours": 15, "n_neurons": 40}
    assert landscape(rows, seed=3).places == first.places
    assert in_words(first.facts) == "the decoder directions of 40 neurons on a plane by UMAP (cosine, 15 neighbours)"
    assert landscape(rows[:15], seed=3).facts["method"] == "PCA"


def test_a_release_ships_the_coordinates_and_names_the_method(release: Path):
    rows = read_table(release / "neurons/neurons/train.parquet")
    facts = json.loads((release / "neurons/landscape.json").read_text())
    placed = [row for row in rows if row["x"] is not None]
    assert len(placed) == facts["n_neurons"] >= 3
    assert max(max(abs(row["x"]), abs(row["y"])) for row in placed) == 1.0
    assert in_words(facts) in (release / "neurons/README.md").read_text()
