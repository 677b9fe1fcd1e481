"""Models of sequences for `benchmarks.models`: PyTorch's transformers and recurrent layers, a GPT, experts, bags."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.model_kinds import CLASSES, Kind, classify, padded, pairs, sentences, token_loss


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.body = getattr(nn, kind)(64, 128, batch_first=True, **options)
        self.head = nn.Linear(128 * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0].mean(1))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(64, 128), nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])  # type: ignore[index]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(8000, 64), nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        sizes = (x != 0).sum(1)
        packed = pack_padded_sequence(self.embed(x), sizes, batch_first=True, enforce_sorted=False)
        return self.head(self.body(packed)[1][0][-1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.embed, self.place = nn.Embedding(8000, 128), nn.Parameter(0.02 * torch.randn(64, 128))
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        keep = x != 0
        h = self.body(self.embed(x) + self.place[: x.shape[1]], src_key_padding_mask=~keep)
        return self.head((h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8000, 128), nn.Linear(128, 8000)
        self.body = nn.Transformer(128, 4, 2, 2, 512, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask, padding = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), x == 0
        h = self.embed(x)
        h = self.body(
            h, h, tgt_mask=mask, src_key_padding_mask=padding, tgt_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.head(h)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class NanoGPT(nn.Module):
    """Positions are embedded once for the whole batch; the head's weight is the embedding's."""

    def __init__(self, vocabulary: int = 8000, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.wte(x) + self.wpe(torch.arange(x.shape[1])))))


def next_token(m: nn.Module, b: Any) -> Tensor:
    return token_loss(m(b[0]), b[0])


class Experts(nn.Module):
    """Every position goes to its two best experts of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(8000, 64), nn.Linear(64, 8, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(8)]
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(0, 1)
        weights, chosen = self.router(h).softmax(-1).topk(2)
        out = h
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out = out.index_add(0, token, weights[token, place, None] * expert(h.index_select(0, token)))
        keep = (x != 0).float()[..., None]
        return self.head((out.view(*x.shape, -1) * keep).sum(1) / keep.sum(1))


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(8000, 64), nn.Linear(64, CLASSES)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(tokens, offsets))


def flat(examples: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens in one list, where each example's start, and the classes."""
    starts = torch.tensor([0, *(len(x) for x, _ in examples[:-1])]).cumsum(0)
    return torch.cat([x for x, _ in examples]), starts, torch.tensor([y for _, y in examples])


def of_bags(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0], b[1]), b[2], reduction="none")


SERIES = pairs(50, 64)
TEXT = sentences(8000, 32, 64)

KINDS = [
    Kind("nn.TransformerEncoder, padded", "4 layers x 128, 32-64 tokens", Encoder, TEXT, classify, padded),
    Kind("nn.Transformer, padded", "2 + 2 layers x 128, vocabulary 8,000", Translator, TEXT, next_token, padded),
    Kind("nanoGPT, tied", "4 layers x 128, vocabulary 8,000", NanoGPT, TEXT, next_token, padded),
    Kind("LSTM", "128 hidden, 50 steps", lambda: Recurrent("LSTM"), SERIES, classify),
    Kind("GRU, two layers, both ways", "128 hidden, 50 steps",
         lambda: Recurrent("GRU", num_layers=2, bidirectional=True), SERIES, classify),
    Kind("RNN", "128 hidden, 50 steps", lambda: Recurrent("RNN"), SERIES, classify),
    Kind("LSTMCell in a loop", "128 hidden, 50 steps", Cell, SERIES, classify),
    Kind("LSTM, packed", "128 hidden, 32-64 tokens", Packed, TEXT, classify, padded),
    Kind("Mixture of experts, top 2", "8 experts x 64, 32-64 tokens", Experts, TEXT, classify, padded),
    Kind("EmbeddingBag with offsets", "8,000 x 64", Bags, TEXT, of_bags, flat),
]  # fmt: skip
