"""Sparse latent attention gives what Transformers' own eager code gives, however tokens are packed, cut and paged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_world import DeBuffer, Reference, drain, enter, greedy, prefill, random_tokens, turn
from transformers import AutoModelForCausalLM

from dualpath.model import LayerwisePrefill, LoadedModel, PagedDecode, UnsupportedModelError, make_checkpoint, sparse
from dualpath.model.attention import PackedPass
from dualpath.model.spans import PackedSequence
from dualpath.model.sparse import Selection
from dualpath.spec.architectures import Architecture

TOP_K = 32
ATOL = 1e-4
ROOM = 700
"""Rows of a layer's buffer in these tests."""


class Pair:
    """A model of two layers, here and in Transformers: few enough top-k choices that rounding decides none of them."""

    def __init__(self, path: Path) -> None:
        self.model = LoadedModel.load(path)
        self.eager = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()

    @torch.no_grad()
    def expected(self, prompt: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.eager(torch.tensor([prompt])).logits[0]
        return logits

    def generated(self, prompt: list[int], max_tokens: int) -> list[int]:
        return Reference(self.eager).generate(prompt, max_tokens)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    made: dict[Any, Pair] = {}

    def make(architecture: Architecture, top_k: int = TOP_K) -> Pair:
        if (architecture, top_k) not in made:
            path = tmp_path_factory.mktemp(architecture)
            made[architecture, top_k] = Pair(
                make_checkpoint(path, architecture, seed=5, num_hidden_layers=2, index_topk=top_k)
            )
        return made[architecture, top_k]

    return make


@pytest.fixture(params=["deepseek_v32", "glm_moe_dsa"])
def family(request: pytest.FixtureRequest) -> Architecture:
    architecture: Architecture = request.param
    return architecture


@pytest.fixture
def pair(pairs: Callable[..., Pair], family: Architecture) -> Pair:
    return pairs(family)


class Pass(PackedPass):
    """A pass over one buffer a layer, which keeps what was in the new rows when they were said to be written."""

    def __init__(self, model: LoadedModel, buffers: list[torch.Tensor], sequences: list[PackedSequence]) -> None:
        rows = [row for sequence in sequences for row in rows_of(sequence)]
        super().__init__(model.forms, tuple(sequences), torch.tensor(rows))
        self.buffers = buffers
        self.at_written: list[torch.Tensor] = []

    def layer_rows(self, layer: int) -> torch.Tensor:
        return self.buffers[layer]

    def written(self, layer: int) -> None:
        self.at_written.append(self.buffers[layer].clone())


def rows_of(sequence: PackedSequence) -> list[int]:
    """The rows of a sequence's new tokens."""
    rows = [first + i for first, count in sequence.extents for i in range(count)]
    return rows[sequence.past_tokens :]


class Packed:
    """Prompts that lie apart in one buffer a layer, full of what must not be read."""

    def __init__(self, model: LoadedModel, prompts: list[list[int]]) -> None:
        self.model, self.prompts = model, prompts
        generator = torch.Generator().manual_seed(0)
        self.buffers = [torch.randn((ROOM, one), generator=generator) * 9 for one in model.row_elements]
        self.done = [0] * len(prompts)
        self.first_rows = [3 + 7 * i + sum(map(len, prompts[:i])) for i in range(len(prompts))]
        self.logits: list[list[torch.Tensor]] = [[] for _ in prompts]

    def forward(self, counts: list[int]) -> None:
        """One packed forward with the next ``counts[i]`` tokens of prompt i."""
        sequences, ids, positions, members = [], [], [], []
        for i, count in enumerate(counts):
            count = min(count, len(self.prompts[i]) - self.done[i])
            if count:
                past = self.done[i]
                sequences.append(PackedSequence(len(ids), count, past, ((self.first_rows[i], past + count),)))
                ids += self.prompts[i][past : past + count]
                positions += range(past, past + count)
                members.append((i, count))
                self.done[i] += count
        self.last = Pass(self.model, self.buffers, sequences)
        logits = self.model.forward(self.last, ids, positions, list(range(len(ids))))
        for (i, _), part in zip(members, logits.split([count for _, count in members]), strict=True):
            self.logits[i].append(part)

    def all_logits(self, chunk_tokens: int = ROOM) -> list[torch.Tensor]:
        while any(done < len(prompt) for done, prompt in zip(self.done, self.prompts, strict=True)):
            self.forward([chunk_tokens] * len(self.prompts))
        return [torch.cat(parts) for parts in self.logits]


def close(given: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(given, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("tokens", [1, TOP_K - 1, TOP_K, TOP_K + 1, 40, 3 * TOP_K])
def test_a_forward_gives_the_eager_logits(pair: Pair, tokens: int) -> None:
    prompt = random_tokens(tokens, seed=tokens)
    (logits,) = Packed(pair.model, [prompt]).all_logits()
    assert close(logits, pair.expected(prompt))


def test_a_top_k_above_the_context_is_dense(
    pairs: Callable[..., Pair], family: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes no index score; with the smaller top-k, the same weights give something else."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("index scores were computed")

    prompt = random_tokens(3 * TOP_K, seed=1)
    (few,) = Packed(pairs(family).model, [prompt]).all_logits()
    monkeypatch.setattr(Selection, "select", refuse)
    wide = pairs(family, 3 * TOP_K)
    (logits,) = Packed(wide.model, [prompt]).all_logits()
    assert close(logits, wide.expected(prompt))
    assert close(logits[:TOP_K], few[:TOP_K]) and not close(logits[TOP_K:], few[TOP_K:])


@pytest.mark.parametrize("chunk_tokens", [1, 7, TOP_K, 50])
def test_chunks_over_cached_rows(pair: Pair, chunk_tokens: int) -> None:
    prompt = random_tokens(3 * TOP_K, seed=2)
    (logits,) = Packed(pair.model, [prompt]).all_logits(chunk_tokens)
    assert close(logits, pair.expected(prompt))


@pytest.mark.parametrize("scratch_bytes", [1, 100_000, sparse.SCRATCH_BYTES])
def test_packed_sequences_do_not_see_each_other(
    pair: Pair, scratch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short of the top-k, across it and beyond; in pieces of one query, of some, and of all; keys in several spans."""
    monkeypatch.setattr(sparse, "SCRATCH_BYTES", scratch_bytes)
    monkeypatch.setattr(sparse, "SPAN_ROWS", 29)
    prompts = [random_tokens(count, seed=10 + count) for count in (90, 5, 61, 3 * TOP_K, TOP_K + 1, 1)]
    for chunk_tokens in (ROOM, 13):
        for prompt, logits in zip(prompts, Packed(pair.model, prompts).all_logits(chunk_tokens), strict=True):
            assert close(logits, pair.expected(prompt))


def test_decode_steps_over_scattered_extents(pair: Pair) -> None:
    """Rows prefilled in one run are moved to runs out of order; then two sequences get a token each in a step."""
    prompts = [random_tokens(3 * TOP_K, seed=20), random_tokens(70, seed=21)]
    world = Packed(pair.model, prompts)
    world.forward([60, 60])
    extents = [((600, 25), (500, 7), (640, 28), (400, 40)), ((560, 33), (540, 1), (300, 40))]
    for buffer in world.buffers:
        source = buffer.clone()
        buffer.normal_()
        for first_row, runs in zip(world.first_rows, extents, strict=True):
            rows = torch.tensor([first + i for first, count in runs for i in range(count)][:60])
            buffer[rows] = source[first_row : first_row + 60]
    for place in range(60, 70):
        sequences = [PackedSequence(i, 1, place, upto(runs, place + 1)) for i, runs in enumerate(extents)]
        packed = Pass(pair.model, world.buffers, sequences)
        logits = pair.model.forward(packed, [prompt[place] for prompt in prompts], [place] * 2, [0, 1])
        for i, prompt in enumerate(prompts):
            assert close(logits[i], pair.expected(prompt[: place + 1])[-1])


def upto(runs: tuple[tuple[int, int], ...], tokens: int) -> tuple[tuple[int, int], ...]:
    kept = []
    for first, count in runs:
        if tokens > 0:
            kept.append((first, min(count, tokens)))
        tokens -= count
    return tuple(kept)


def test_rows_are_written_when_their_index_keys_are(pair: Pair) -> None:
    """Shipping starts then, so what is there must be what is there in the end."""
    world = Packed(pair.model, [random_tokens(40, seed=30)])
    world.all_logits()
    assert len(world.last.at_written) == 2
    for early, late in zip(world.last.at_written, world.buffers, strict=True):
        assert torch.equal(early, late)


def test_a_step_reads_no_latents_but_the_selected(pair: Pair) -> None:
    """What is selected is computed from index keys alone; spoiling the other latents changes nothing."""
    prompt = random_tokens(80, seed=31)
    world = Packed(pair.model, [prompt])
    world.forward([79])
    seen: list[torch.Tensor] = []
    select = Selection.select

    def remember(selection: Selection, keys: torch.Tensor, part: PackedSequence) -> torch.Tensor:
        rows = select(selection, keys, part)
        assert rows.unique().numel() == TOP_K
        spoiled = torch.ones(ROOM, dtype=torch.bool)
        spoiled[rows.flatten()] = False
        world.buffers[len(seen)][spoiled, :40] = torch.nan
        seen.append(rows)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "select", remember)
        world.forward([1])
    assert len(seen) == {"deepseek_v32": 2, "glm_moe_dsa": 1}[pair.model.network.config.model_type]
    assert close(world.logits[0][-1][-1], pair.expected(prompt)[-1])


def test_engines_give_the_tokens_of_generate(pair: Pair) -> None:
    prompts = [random_tokens(230, seed=40), random_tokens(20, seed=41), random_tokens(100, seed=42)]
    engine, decode = LayerwisePrefill(pair.model), PagedDecode(pair.model, blocks=14)
    for i in range(14):
        decode.admit(100 + i, prompt_tokens=60, first_token=0, sampling=greedy(2))
    for i in (0, 2, 3, 5, 6, 8, 9, 10, 12, 13):
        decode.release(100 + i)
    outputs, _ = turn(engine, decode, prompts, 25, chunk_tokens=70)
    engine.close()
    assert outputs == [pair.generated(prompt, 25) for prompt in prompts]


def test_an_unwritten_index_would_be_noticed(pair: Pair) -> None:
    """The index keys travel with the rows: blocks filled without them give other tokens."""
    prompt = random_tokens(150, seed=43)
    buffer, engine = DeBuffer(pair.model.layout, prompt), LayerwisePrefill(pair.model)
    (first,) = prefill(engine, [buffer], [greedy(12)])
    engine.close()
    assert first.token is not None
    outputs = []
    for spoiled in (False, True):
        if spoiled:
            buffer.pages[..., 40 * 4 :] = 0
        decode = PagedDecode(pair.model, blocks=3)
        enter(decode, 0, buffer, first, greedy(12))
        outputs.append([first.token.token_id, *drain(decode)[0]])
    assert outputs[0] == pair.generated(prompt, 12) != outputs[1]


def test_one_selected_token_is_enough_to_load(tmp_path: Path) -> None:
    model = LoadedModel.load(make_checkpoint(tmp_path / "one", "deepseek_v32", num_hidden_layers=2, index_topk=1))
    assert model.layout.layers == 2


def test_layers_that_share_an_indexer_attend_to_its_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep no index keys, and none is scored for them; 3 layers of which the middle one shares."""
    path = make_checkpoint(
        tmp_path / "shared",
        "glm_moe_dsa",
        num_hidden_layers=3,
        indexer_types=["full", "shared", "full"],
        index_topk=TOP_K,
    )
    model = LoadedModel.load(path)
    assert [len(model.layout.kind(layer).parts) for layer in range(3)] == [3, 2, 3]
    scored: list[int] = []
    select = Selection.select

    def counted(self: Selection, keys: torch.Tensor, part: PackedSequence) -> torch.Tensor:
        scored.append(part.new_tokens)
        return select(self, keys, part)

    monkeypatch.setattr(Selection, "select", counted)
    prompt = random_tokens(3 * TOP_K, seed=8)
    buffers = [torch.full((len(prompt), elements), torch.nan) for elements in model.row_elements]
    packed = Pass(model, buffers, [PackedSequence(0, len(prompt), 0, ((0, len(prompt)),))])
    logits = model.forward(packed, prompt, list(range(len(prompt))), list(range(len(prompt))))
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = network(input_ids=torch.tensor([prompt])).logits[0]
    assert torch.allclose(logits, expected, atol=1e-4)
    assert sum(scored) == 2 * 2 * TOP_K, "queries beyond the first k, in the two layers with an indexer"


def test_an_indexer_with_another_formula_is_refused(pair: Pair) -> None:
    scores = Selection()
    with pytest.raises(UnsupportedModelError, match="known"):
        torch.nn.functional.gelu(scores)
    with pytest.raises(UnsupportedModelError, match="scores by matmul, topk"):
        torch.matmul(torch.ones(1, 1), scores).topk(3, dim=-1)
    packed = Pass(pair.model, [torch.zeros(2, pair.model.row_elements[0])], [PackedSequence(0, 1, 0, ((0, 1),))])
    with pytest.raises(UnsupportedModelError, match="layer 0 has an indexer"):
        packed.update_indexer(torch.zeros(1, 1, 16), 0)
