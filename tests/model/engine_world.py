"""A whole agent's round trip without processes or networks: a store of Full Blocks, a DE buffer, prefill, decode."""

import itertools

import numpy as np
import torch

from dualpath.kv.layout import KVLayout
from dualpath.model import LayerwisePrefill, LoadedModel, PagedDecode, PrefillItem, PrefillOutput
from dualpath.model.attention import PackedPass
from dualpath.model.spans import PackedSequence
from dualpath.spec.sampling import SamplingParams

BLOCK = 64
CLEAR_GAP = 4e-5
"""Between the best two logits, several times what float32 rounding moves them by (about 1e-5 at worst)."""


class BlockStore:
    """Full Blocks by the tokens they and all earlier blocks hold."""

    def __init__(self) -> None:
        self.pages: dict[tuple[int, ...], np.ndarray] = {}

    def hit_blocks(self, tokens: list[int]) -> int:
        """Stored blocks of the prefix; the last token is always left to compute."""
        blocks = 0
        while (blocks + 1) * BLOCK < len(tokens) and tuple(tokens[: (blocks + 1) * BLOCK]) in self.pages:
            blocks += 1
        return blocks


class DeBuffer:
    """Host KV of one request, block by block as Full Block pages."""

    def __init__(self, layout: KVLayout, prompt: list[int], store: BlockStore | None = None) -> None:
        self.layout, self.prompt = layout, prompt
        blocks = -(-len(prompt) // BLOCK)
        self.pages = np.full((blocks, layout.full_block_bytes), 0xAB, dtype=np.uint8)
        self.hit_tokens = 0
        if store is not None:
            hits = store.hit_blocks(prompt)
            self.hit_tokens = hits * BLOCK
            for block in range(hits):
                stored = store.pages[tuple(prompt[: (block + 1) * BLOCK])].reshape(-1)
                for start, stop in layout.extents(layout.layers_seen(block, self.hit_tokens)):
                    self.pages[block, start:stop] = stored[start:stop]  # what no window sees stays unread

    def rows(self, layer: int) -> np.ndarray:
        """A copy of the layer's rows, ``[tokens, row_bytes]``."""
        start, stop = self.layout.layer_range(layer)
        return self.pages[:, start:stop].reshape(-1, self.layout.row_bytes[layer])

    def write(self, layer: int, first_token: int, rows: np.ndarray) -> None:
        for offset, row in enumerate(rows.reshape(-1, self.layout.row_bytes[layer])):
            block, token = divmod(first_token + offset, BLOCK)
            start, stop = self.layout.layer_range(layer, token, 1)
            self.pages[block, start:stop] = row


class BufferIO:
    """LayerIO over DE buffers; remembers where it was asked to load, and checks that hit rows come back unchanged."""

    def __init__(self, buffers: list[DeBuffer], items: list[PrefillItem]) -> None:
        self.buffers, self.items = buffers, items
        self.load_errors: dict[tuple[int, int], Exception] = {}
        """(layer, item) → the error its load ends with."""
        self.loaded: list[tuple[int, tuple[int, ...]]] = []
        self.shipped: list[tuple[int, tuple[int, ...]]] = []
        self.addresses: set[int] = set()

    def load_layer(self, layer: int, destinations: list[np.ndarray | None]) -> list[Exception | None]:
        self.loaded.append((layer, tuple(i for i, d in enumerate(destinations) if d is not None)))
        for i, destination in enumerate(destinations):
            if destination is not None:
                self.addresses.add(destination.ctypes.data)
                buffer, past = self.buffers[i], self.items[i].past_tokens
                seen = buffer.layout.kind(layer).first_seen(past)
                rows = destination.reshape(past, -1)
                rows[:seen] = 0xFF  # NaN: a row that no window sees is read by nobody
                rows[seen:] = buffer.rows(layer)[seen:past]
        return [self.load_errors.get((layer, i)) for i in range(len(destinations))]

    def ship_layer(self, layer: int, rows: list[np.ndarray | None]) -> list[Exception | None]:
        self.shipped.append((layer, tuple(i for i, r in enumerate(rows) if r is not None)))
        for i, span in enumerate(rows):
            if span is None:
                continue
            item, buffer = self.items[i], self.buffers[i]
            rows_sent = span.reshape(item.past_tokens + len(item.token_ids), buffer.layout.row_bytes[layer])
            seen = buffer.layout.kind(layer).first_seen(item.past_tokens)
            assert np.array_equal(rows_sent[seen : item.past_tokens], buffer.rows(layer)[seen : item.past_tokens])
            buffer.write(layer, item.past_tokens, rows_sent[item.past_tokens :])
        return [None] * len(rows)


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)


def prefill(
    engine: LayerwisePrefill, buffers: list[DeBuffer], sampling: list[SamplingParams], chunk_tokens: int | None = None
) -> list[PrefillOutput]:
    """All prompts, packed together, in chunks of at most `chunk_tokens`; what the last chunk of each gave."""
    done = [buffer.hit_tokens for buffer in buffers]
    outputs: dict[int, PrefillOutput] = {}
    while len(outputs) < len(buffers):
        active = [i for i in range(len(buffers)) if i not in outputs]
        items = []
        for i in active:
            prompt = buffers[i].prompt
            stop = len(prompt) if chunk_tokens is None else min(len(prompt), done[i] + chunk_tokens)
            last = stop == len(prompt)
            items.append(PrefillItem(prompt[done[i] : stop], done[i], sampling[i] if last else None))
            done[i] = stop
        for i, item, output in zip(
            active, items, engine.run(items, BufferIO([buffers[i] for i in active], items)), strict=True
        ):
            assert output.error is None
            if item.sampling is not None:
                outputs[i] = output
            else:
                assert output.token is None
    return [outputs[i] for i in range(len(buffers))]


def enter(decode: PagedDecode, sequence: int, buffer: DeBuffer, first: PrefillOutput, sampling: SamplingParams) -> None:
    """What a DE does with a complete buffer."""
    assert first.token is not None
    decode.admit(sequence, len(buffer.prompt), first.token.token_id, sampling)
    for block, page in enumerate(buffer.pages):
        tokens = min(BLOCK, len(buffer.prompt) - block * BLOCK)
        decode.fill_block(sequence, block, page.reshape(-1), tokens)
    decode.join(sequence)


def persist(decode: PagedDecode, sequence: int, buffer: DeBuffer, output: list[int], store: BlockStore) -> None:
    """Store the Full Blocks of a sequence that the store lacks: a prompt's from the buffer, as a DE does."""
    tokens = buffer.prompt + output
    for block in range(buffer.hit_tokens // BLOCK, decode.full_blocks(sequence)):
        page = np.empty(decode.model.layout.full_block_bytes, dtype=np.uint8)
        if (block + 1) * BLOCK <= len(buffer.prompt):
            page[:] = buffer.pages[block]
        else:
            decode.copy_block(sequence, block, page)
        store.pages.setdefault(tuple(tokens[: (block + 1) * BLOCK]), page)


def drain(decode: PagedDecode) -> dict[int, list[int]]:
    """Step until nobody is left; the tokens of each sequence."""
    tokens: dict[int, list[int]] = {}
    while outputs := decode.step():
        for output in outputs:
            assert output.draw is not None
            tokens.setdefault(output.sequence, []).append(output.draw.token_id)
    return tokens


def turn(
    engine: LayerwisePrefill,
    decode: PagedDecode,
    prompts: list[list[int]],
    max_tokens: int,
    store: BlockStore | None = None,
    chunk_tokens: int | None = None,
) -> tuple[list[list[int]], list[int]]:
    """One turn of several agents at once: their output tokens, and how many prompt tokens each found in the store."""
    params = [greedy(max_tokens)] * len(prompts)
    buffers = [DeBuffer(engine.model.layout, prompt, store) for prompt in prompts]
    firsts = prefill(engine, buffers, params, chunk_tokens)
    for i, (buffer, first) in enumerate(zip(buffers, firsts, strict=True)):
        enter(decode, i, buffer, first, params[i])
    rest = drain(decode)
    outputs = [[first.token.token_id, *rest.get(i, [])] for i, first in enumerate(firsts) if first.token]
    for i, output in enumerate(outputs):
        if store is not None:
            persist(decode, i, buffers[i], output, store)
        decode.release(i)
    return outputs, [buffer.hit_tokens for buffer in buffers]


PLACES = [
    (1, ((0, 1),)),
    (1, ((40, 200),)),
    (1, ((0, 64), (192, 64), (128, 3))),
    (7, ((5, 7),)),
    (7, ((5, 180),)),
    (90, ((3, 230),)),
]
"""Of a sequence in a buffer: new tokens, and the extents of all its rows."""


class Buffers(PackedPass):
    """A pass over one buffer a layer, whose rows are given for each sequence as runs."""

    def __init__(self, model: LoadedModel, buffers: list[torch.Tensor], pack: list[tuple[int, int, tuple]]) -> None:
        """`pack` lists ``(past tokens, new tokens, extents)``."""
        sequences, new_rows = [], []
        for past, new, extents in pack:
            sequences.append(PackedSequence(len(new_rows), new, past, extents))
            order = [row for first, count in extents for row in range(first, first + count)]
            new_rows += order[past : past + new]
        super().__init__(model.forms, tuple(sequences), torch.tensor(new_rows))
        self.buffers = buffers

    def layer_rows(self, layer: int) -> torch.Tensor:
        return self.buffers[layer]


def buffers_of(model: LoadedModel, rows: int) -> list[torch.Tensor]:
    return [torch.full((rows, elements), torch.nan) for elements in model.row_elements]


def packed_logits(
    model: LoadedModel, prompts: list[list[int]], firsts: tuple[int, ...], stops: tuple[int, ...]
) -> list[torch.Tensor]:
    """Logits of prompts that lie in one buffer a layer from rows `firsts` on, in passes that hold chunks of all.

    A pass ends at token ``stops[i]`` of each prompt that is not done.
    """
    buffers = buffers_of(model, max(first + len(prompt) for first, prompt in zip(firsts, prompts, strict=True)))
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start, stop in itertools.pairwise((0, *stops)):
        pack, ids, places, owners = [], [], [], []
        for index, (prompt, first) in enumerate(zip(prompts, firsts, strict=True)):
            end = min(stop, len(prompt))
            if start < end:
                pack.append((start, end - start, ((first, end),)))
                ids += prompt[start:end]
                places += range(start, end)
                owners += [index] * (end - start)
        logits = model.forward(Buffers(model, buffers, pack), ids, places, list(range(len(ids))))
        for owner, row in zip(owners, logits, strict=True):
            found[owner].append(row)
    return [torch.stack(rows) for rows in found]


def random_tokens(count: int, seed: int, vocabulary: int = 256) -> list[int]:
    return [int(t) for t in torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))]


class Reference:
    """Transformers' own greedy generation on the full prompt."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        key = (tuple(prompt), max_tokens)
        if key not in self._known:
            ids = torch.tensor([prompt])
            out = self.network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            best = torch.cat(out.logits).topk(2).values
            gap = float((best[:, 0] - best[:, 1]).min())
            assert gap > CLEAR_GAP, f"two tokens are within {gap:.1e}: rounding may decide; give the test another seed"
            self._known[key] = out.sequences[0, len(prompt) :].tolist()
        return self._known[key]


class Engines:
    """What a test of one architecture needs."""

    def __init__(self, architecture: str, model: LoadedModel, reference: Reference) -> None:
        self.architecture, self.model, self.reference = architecture, model, reference
