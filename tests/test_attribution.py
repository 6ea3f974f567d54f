"""Attribution: on models whose circuit is known the graph finds it, with the sums that were worked out by hand."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from safesail.diagnosis.attribution import Graph, graph, parents, svg
from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.lm.hooks import replace
from safesail.neurons import NeuronDatabase
from safesail.recipe import TokenPolicy
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

WIDTH = 8
SHOUT, WHISPER, NOISE, ECHO, ANSWER, ASIDE = range(6)
"""Directions of the planted model's stream; ASIDE is written by the embeddings alone."""
POINTS = ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp")
TEXT = "The garden"


class Block(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp.weight = nn.Parameter(weight.T.contiguous())


class Planted(nn.Module):
    """A linear model with three blocks: x + mlp(sum of x over this token and all before it)."""

    def __init__(self, embeddings: Tensor, weights: list[Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(embeddings)
        self.layers = nn.ModuleList([Block(weight) for weight in weights])
        self.config: Any = SimpleNamespace(max_position_embeddings=64)
        self.generation_config = SimpleNamespace(eos_token_id=None)

    @property
    def base_model(self) -> "Planted":
        return self

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool = False
    ) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.layers:
            assert isinstance(block, Block)
            x = x + block.mlp(x.cumsum(1))
        return x


def sae_of(hook_point: str, directions: list[int], bias: float = 0.0, **config: Any) -> Sae:
    """An SAE whose latents are directions of the stream; b_dec is `bias` in all of them."""
    rows = torch.eye(WIDTH)[directions]
    settings = SaeConfig(
        d_in=WIDTH,
        d_sae=len(directions),
        architecture="relu",
        hook_point=hook_point,
        token_policy=TokenPolicy(sink_norm_multiple=None),
        **config,
    )
    return Sae(settings, W_enc=rows.T.contiguous(), b_enc=torch.zeros(len(rows)), W_dec=rows, b_dec=bias * rows.sum(0))


def weight(**entries: float) -> Tensor:
    """A matrix with the entries `SHOUT_to_ECHO=0.5`."""
    matrix = torch.zeros(WIDTH, WIDTH)
    for name, value in entries.items():
        source, target = name.split("_to_")
        matrix[globals()[source], globals()[target]] = value
    return matrix


@pytest.fixture
def planted(tokenizer: Any) -> Inspector:
    """Token 0 shouts 2 and token 1 whispers 3 with a noise of 1 that the SAE does not know.

    Block 0 writes what the embeddings (ASIDE and the last two) say; block 1 echoes 0.5 · shout; block 2 answers
    2 · echo - 0.2 · whisper + 0.25 · noise + 1 · aside.
    """
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) == 2, "the text is to have two tokens"
    embeddings = torch.zeros(len(tokenizer), WIDTH)
    embeddings[ids[0], 6] = 1.0
    embeddings[ids[1], 6] = -1.0  # the sum over tokens reads token 0 at token 1 as well: taken back here
    embeddings[ids[1], 7] = 1.0
    embeddings[ids[1], ASIDE] = 2.0
    first = torch.zeros(WIDTH, WIDTH)
    first[6, SHOUT] = 2.0
    first[7, WHISPER], first[7, NOISE] = 3.0, 1.0
    weights = [
        first,
        weight(SHOUT_to_ECHO=0.5),
        weight(ECHO_to_ANSWER=2.0, WHISPER_to_ANSWER=-0.2, NOISE_to_ANSWER=0.25, ASIDE_to_ANSWER=1.0),
    ]
    saes = {
        POINTS[0]: sae_of(POINTS[0], [SHOUT, WHISPER]),
        POINTS[1]: sae_of(POINTS[1], [ECHO]),
        POINTS[2]: sae_of(POINTS[2], [ANSWER]),
    }
    return Inspector(Planted(embeddings, weights), tokenizer, saes, NeuronDatabase({}, {}, {}, {}), "planted")


def edges_of(found: Graph) -> dict[tuple[str, int, str, int], float]:
    """{(parent, its unit, child, its unit): attribution}."""
    nodes = [(node.hit.neuron_id, node.index) for node in found.nodes]
    return {(*nodes[edge.parent], *nodes[edge.child]): edge.attribution for edge in found.edges}


def test_the_graph_finds_the_planted_circuit_with_signs_order_and_exact_values(planted: Inspector) -> None:
    found = graph(planted, TEXT, "layers.2.mlp/0")
    # echo at token 0: 0.5 · 2 = 1, at token 1 the sum over both tokens: 0.5 · (2 + 0) = 1
    # answer at token 1: 2 · (1 + 1) - 0.2 · 3 + 0.25 · 1 + 1 · 2 = 5.65
    assert found.child.hit.activation == pytest.approx(5.65)
    assert (found.child.index, found.child.token) == (1, " garden")
    assert edges_of(found) == pytest.approx(
        {
            # the shout at token 0 is read by both echoes: 2 · (0.5 · 2 + 0.5 · 2)
            ("layers.0.mlp/0", 0, "layers.2.mlp/0", 1): 4.0,
            ("layers.1.mlp/0", 0, "layers.2.mlp/0", 1): 2.0,
            ("layers.1.mlp/0", 1, "layers.2.mlp/0", 1): 2.0,
            ("layers.0.mlp/1", 1, "layers.2.mlp/0", 1): -0.6,
            ("layers.0.mlp/0", 0, "layers.1.mlp/0", 0): 1.0,
            ("layers.0.mlp/0", 0, "layers.1.mlp/0", 1): 1.0,
        }
    )
    assert [node.hit.neuron_id for node in found.nodes] == [
        "layers.2.mlp/0",
        "layers.0.mlp/0",
        "layers.1.mlp/0",
        "layers.1.mlp/0",
        "layers.0.mlp/1",
    ]
    assert found.n_parents == 4


def test_a_parent_that_lowers_is_as_strong_as_one_that_raises(planted: Inspector) -> None:
    with torch.no_grad():
        planted.model.layers[2].mlp.weight[ANSWER, WHISPER] = -1.99
    found = graph(planted, TEXT, "layers.2.mlp/0", top=1)  # 4 - 1.99 · 3 + 0.25 + 2 = 0.28 is left at token 1
    assert edges_of(found) == pytest.approx({("layers.0.mlp/0", 0, "layers.2.mlp/0", 0): 2.0})
    found = graph(planted, TEXT, "layers.2.mlp/0", index=1, top=1)
    assert found.child.hit.activation == pytest.approx(0.28)
    assert edges_of(found) == pytest.approx({("layers.0.mlp/1", 1, "layers.2.mlp/0", 1): -5.97})


def test_the_shares_add_up_to_what_passes_each_hook_point(planted: Inspector) -> None:
    first, second = graph(planted, TEXT, "layers.2.mlp/0").shares
    assert first.hook_point == "layers.0.mlp"
    assert first[1:] == pytest.approx((4.0 - 0.6, 0.25, 0.0, 0.0))
    assert first.total == pytest.approx(3.65)  # the other 2 of the 5.65 come from the embeddings
    assert second[1:] == pytest.approx((4.0, 0.0, 0.0, 0.0))
    said = graph(planted, TEXT, "layers.2.mlp/0", top=1).sentences()[0]
    assert "of the activation 5.65 its neurons account for +3.40 (+4.00 by the 1 shown)" in said
    assert "does not reconstruct for +0.25" in said
    assert "+2.00 is not explained here" in said


def test_the_decoders_bias_is_an_own_share(planted: Inspector) -> None:
    planted.saes[POINTS[0]] = sae_of(POINTS[0], [SHOUT, WHISPER], bias=1.0)
    share = graph(planted, TEXT, "layers.2.mlp/0").shares[0]
    # a = x - 1: the shout counts 1 at token 0, the whisper 2 at token 1, and neither is active elsewhere
    # b_dec · g: 4 / 2 = 2 per unit of shout at token 0, 2 · 0.5 = 1 at token 1, -0.2 per unit of whisper at both, which
    # answer reads at token 1 as a sum over tokens
    assert share.parents == pytest.approx(1 * 2 - 0.2 * 2)
    assert share.bias == pytest.approx(2 + 1 - 0.2 - 0.2)
    assert share.total == pytest.approx(3.65)


def test_tokens_that_the_policy_leaves_out_are_a_share_of_their_own(planted: Inspector) -> None:
    policy = TokenPolicy(sink_norm_multiple=2.5)
    first = sae_of(POINTS[0], [SHOUT, WHISPER])
    first.config = first.config.model_copy(update={"token_policy": policy, "median_norm": 1.2})
    planted.saes[POINTS[0]] = first  # above a norm of 3: token 1, with √(3² + 1²)
    share = graph(planted, TEXT, "layers.2.mlp/0").shares[0]
    assert share[1:] == pytest.approx((4.0, 0.0, 0.0, 0.25 - 0.6))


@pytest.mark.parametrize("neuron", ["layers.0.mlp/0", "layers.0.mlp/1", "layers.1.mlp/0"])
def test_in_a_linear_model_an_attribution_is_what_an_ablation_takes_away(planted: Inspector, neuron: str) -> None:
    hook_point, _, latent = neuron.rpartition("/")
    sae = planted.saes[hook_point]
    before = float(planted.inspect(TEXT).codes[POINTS[2]].of(1)[0][0])

    def ablate(x: Tensor) -> Tensor:
        return x - sae.encode(x)[..., int(latent), None] * sae.W_dec[int(latent)]

    with replace(planted.model, hook_point, ablate):
        after = float(planted.inspect(TEXT).codes[POINTS[2]].of(1)[0][0])
    lost = {parent.neuron_id: parent.attribution for parent in parents(planted, TEXT, "layers.2.mlp/0")}
    assert before - after == pytest.approx(lost[neuron], abs=1e-6)


def test_parents_are_summed_over_tokens_and_ordered(planted: Inspector) -> None:
    found = parents(planted, TEXT, "2_0")
    assert [parent.neuron_id for parent in found] == ["layers.0.mlp/0", "layers.1.mlp/0", "layers.0.mlp/1"]
    assert [parent.attribution for parent in found] == pytest.approx([4.0, 4.0, -0.6])
    assert [(parent.activation, parent.n_tokens) for parent in found] == [(2.0, 1), (1.0, 2), (3.0, 1)]


def test_tokens_after_the_childs_are_no_parents(planted: Inspector) -> None:
    found = graph(planted, TEXT, "layers.2.mlp/0", index=0)
    assert edges_of(found) == pytest.approx(
        {
            ("layers.0.mlp/0", 0, "layers.2.mlp/0", 0): 2.0,
            ("layers.1.mlp/0", 0, "layers.2.mlp/0", 0): 2.0,
            ("layers.0.mlp/0", 0, "layers.1.mlp/0", 0): 1.0,
        }
    )


def test_a_normalising_sae_counts_its_latents_at_the_tokens_scale(planted: Inspector) -> None:
    planted.saes[POINTS[0]] = sae_of(POINTS[0], [SHOUT, WHISPER], normalize_activations="constant_norm_rescale")
    share = graph(planted, TEXT, "layers.2.mlp/0").shares[0]
    assert share[1:] == pytest.approx((3.4, 0.25, 0.0, 0.0), abs=1e-5)


# --- through a real architecture ----------------------------------------------------------------------------------


@pytest.fixture
def real(model: Any, tokenizer: Any) -> Inspector:
    """The tiny Llama with random SAEs at both MLPs."""
    generator, saes = torch.Generator().manual_seed(0), {}
    for point in POINTS[:2]:
        W_dec = nn.functional.normalize(torch.randn(24, 32, generator=generator), dim=-1)
        policy = TokenPolicy(sink_norm_multiple=None)
        config = SaeConfig(d_in=32, d_sae=24, k=6, hook_point=point, token_policy=policy)
        saes[point] = Sae(config, W_dec.T.contiguous(), torch.zeros(24), W_dec, torch.zeros(32))
    return Inspector(model, tokenizer, saes, NeuronDatabase({}, {}, {}, {}), "tiny")


def strongest_child(inspector: Inspector, text: str) -> tuple[str, int]:
    inspection = inspector.inspect(text)
    last = len(inspection.units) - 1
    hit = max((h for h in inspection.hits(last) if h.hook_point == POINTS[1]), key=lambda h: h.activation)
    return hit.neuron_id, last


def test_attributions_are_the_slope_of_the_child_in_a_transformer(real: Inspector) -> None:
    text = "The president was seen near the old house."
    id, index = strongest_child(real, text)
    found = graph(real, text, id, index=index, top=12)
    latent, sae = int(id.rpartition("/")[2]), real.saes[POINTS[1]]

    def child(node: Any, step: float) -> float:
        def nudge(x: Tensor) -> Tensor:
            moved = x.clone()
            moved[0, node.index] += step * node.hit.activation * real.saes[POINTS[0]].W_dec[node.hit.latent]
            return moved

        with replace(real.model, POINTS[0], nudge):
            x = real.activations(text, POINTS[1])
        return float(sae.pre_activations(x[index : index + 1])[0, latent])

    tokens = {node.index for node in found.nodes[1:]}
    assert len(tokens) > 1, "attention is to be part of it"
    for edge in found.edges:
        node = found.nodes[edge.parent]
        slope = (child(node, 1e-3) - child(node, -1e-3)) / 2e-3
        assert edge.attribution == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_it_works_within_inference_mode_and_leaves_no_gradients(real: Inspector) -> None:
    text = "My neighbour talked about the garden."
    id, index = strongest_child(real, text)
    expected = graph(real, text, id, index=index).edges
    with torch.inference_mode():
        assert graph(real, text, id, index=index).edges == expected
    assert all(parameter.grad is None for parameter in real.model.parameters())


# --- what a person may get wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neuron_id": "layers.2.mlp/7"}, "layers.2.mlp has no latent 7; its latents are 0 to 0."),
        ({"neuron_id": "layers.7.mlp/0"}, "'layers.7.mlp/0' is not a neuron here; ids look like layers.0.mlp/1234."),
        ({"neuron_id": "layers.0.mlp/0"}, "layers.0.mlp has no parents: no hook point of planted is computed before"),
        ({"index": 9}, "layers.2.mlp/0 does not fire on unit 9; it fires on 0, 1."),
        ({"prompt": "river"}, "layers.2.mlp/0 does not fire on this prompt; nothing of layers.2.mlp does."),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "the garden " * 60}, "but the model reads 64"),
        ({"top": 0}, "top=0 parents were asked for"),
    ],
)
def test_mistakes_are_said(planted: Inspector, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompt": TEXT, "neuron_id": "layers.2.mlp/0"} | change
    with pytest.raises(InputError, match=re.escape(message)):
        graph(planted, **arguments)


def test_a_release_of_one_hook_point_says_that_there_are_no_parents(planted: Inspector) -> None:
    planted.saes = {POINTS[2]: planted.saes[POINTS[2]]}
    with pytest.raises(InputError, match=r"layers\.2\.mlp has no parents"):
        graph(planted, TEXT, "layers.2.mlp/0")


# --- the drawing --------------------------------------------------------------------------------------------------


def test_the_drawing_is_sound_xml_with_a_column_per_hook_point(planted: Inspector) -> None:
    drawn = svg(graph(planted, TEXT, "layers.2.mlp/0"))
    root = ElementTree.fromstring(drawn)
    tag = "{http://www.w3.org/2000/svg}"
    boxes = root.findall(f"{tag}rect")[1:]
    assert sorted({float(box.attrib["x"]) for box in boxes}) == [20.0, 420.0, 820.0]
    assert len(boxes) == 5
    lines = root.findall(f"{tag}line")
    assert len(lines) == 6
    assert sum("stroke-dasharray" in line.attrib for line in lines) == 1  # the whisper alone lowers
    words = [text.text for text in root.iter(f"{tag}text")]
    assert {"+4.00", "-0.60", "layers.0.mlp", "layers.1.mlp", "layers.2.mlp"} <= set(words)
    assert drawn == svg(graph(planted, TEXT, "layers.2.mlp/0"))
    assert "font-face" not in drawn
    assert "href" not in drawn


def test_hostile_explanations_are_escaped(planted: Inspector) -> None:
    hostile = "<script>x</script> & \x00"
    planted.database.neurons["layers.0.mlp/0"] = {"explanation": hostile, "domains": [], "score": 0.5, "status": "ok"}
    drawn = svg(graph(planted, TEXT, "layers.2.mlp/0"))
    assert "<script" not in drawn
    words = [text.text or "" for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert "<script>x</script> & \ufffd" in words


def test_the_graph_is_plain_json(planted: Inspector, tmp_path: Path) -> None:
    found = json.loads(json.dumps(graph(planted, TEXT, "layers.2.mlp/0").to_json(), allow_nan=False))
    assert found["nodes"][0]["neuron_id"] == "layers.2.mlp/0"
    assert found["shares"][0]["total"] == pytest.approx(3.65)
    assert len(found["edges"]) == 6
