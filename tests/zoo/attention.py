"""PyTorch's own transformers, hand-written ones, tied embeddings."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import ZooTask, right
from zoo.data import VOCABULARY, generator, labelled, lengths, mlp, next_token_loss, pad, texts

SEQUENCES = labelled(5, 8)


class Encoder(nn.Module):
    """nn.TransformerEncoder over padded tokens, and the mean over those that are not padding."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.place = nn.Embedding(VOCABULARY, 8, padding_idx=0), nn.Embedding(16, 8)
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        keep = x != 0
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.body(h, src_key_padding_mask=~keep)
        h = h if self.batch_first else h.transpose(0, 1)
        return self.head((h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


for first in (True, False):
    for norm in (True, False):
        name = f"transformer_encoder_{'batch' if first else 'time'}_first_{'pre' if norm else 'post'}_norm"
        right(name, rotates=first == norm, long=first != norm)(
            lambda first=first, norm=norm: ZooTask(lambda: Encoder(first, norm), texts(), collate=pad)
        )


@right()
def transformer_encoder_with_nested_tensors() -> ZooTask:
    make = lambda: nn.Sequential(  # noqa: E731
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1), nn.Flatten(), nn.Linear(40, 3)
    )
    return ZooTask(make, SEQUENCES)


class Translator(nn.Module):
    """nn.Transformer: encoder and decoder, cross-attention, causal target mask, padding masks, tied output."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Embedding(VOCABULARY, 8), batch_first
        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=batch_first)
        self.place = nn.Parameter(torch.randn(16, 8))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        embedded = [self.embed(x) + self.place[: x.shape[1]] for x in (source, target)]
        if not self.batch_first:
            embedded = [h.transpose(0, 1) for h in embedded]
        mask = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        h = self.body(
            *embedded, tgt_mask=mask, src_key_padding_mask=source == 0, tgt_key_padding_mask=target == 0,
            memory_key_padding_mask=source == 0,
        )  # fmt: skip
        return F.linear(h if self.batch_first else h.transpose(0, 1), self.embed.weight)


def sentence_pairs() -> list[tuple[Tensor, Tensor]]:
    sources, targets = texts(), texts(lengths(4, 9)[::-1])
    return [(source[0], target[0]) for source, target in zip(sources, targets, strict=True)]


def pad_pairs(examples: list[Any]) -> tuple[Tensor, ...]:
    return tuple(nn.utils.rnn.pad_sequence(list(side), batch_first=True) for side in zip(*examples, strict=True))


for first in (True, False):
    right(f"nn_transformer_{'batch' if first else 'time'}_first", long=first)(
        lambda first=first: ZooTask(
            lambda: Translator(first), sentence_pairs(), lambda m, b: next_token_loss(m(*b), b[1]), pad_pairs
        )
    )


class Attention(nn.Module):
    """nn.MultiheadAttention of a sequence to itself or to another one of other width."""

    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head, self.cross = nn.Linear(8, 3), cross

    def forward(self, x: Tensor) -> Tensor:
        keys = x[:, :3, : self.attention.kdim].tanh() if self.cross else x
        values = x[:, :3, -self.attention.vdim :] if self.cross else x
        h, _ = self.attention(x, keys, values, need_weights=not self.cross)
        return self.head(h.mean(1))


for name, options in {
    "self": {},
    "without_bias": {"bias": False},
    "cross": {"cross": True},
    "kdim_vdim": {"cross": True, "kdim": 4, "vdim": 6},
    "bias_kv": {"add_bias_kv": True},
    "zero_attention": {"add_zero_attn": True},
}.items():
    right(f"multihead_attention_{name}", rotates=name == "self")(
        partial(lambda options: ZooTask(lambda: Attention(**options), SEQUENCES), options)
    )


class Block(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.mlp = mlp(width, width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (self.heads, -1)).transpose(1, 2) for h in self.qkv(self.norm1(x)).chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class NanoGPT(nn.Module):
    """Positions are embedded once and broadcast over the batch; the head is tied in one of two ways, or not."""

    def __init__(self, tied: str = "module") -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, 8), nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=False) if tied != "function" else None
        if self.head is not None and tied == "module":
            self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return F.linear(h, self.wte.weight) if self.head is None else self.head(h)


for tied in ("module", "function", "not"):
    right(f"nano_gpt_tied_by_{tied}" if tied != "not" else "nano_gpt_untied", rotates=True)(
        lambda tied=tied: ZooTask(
            lambda: NanoGPT(tied), texts(lengths(4)), lambda m, b: next_token_loss(m(b[0]), b[0]), pad
        )
    )


@right()
def nano_gpt_summed_over_tokens() -> ZooTask:
    loss = lambda m, b: next_token_loss(m(b[0]), b[0], summed=True)  # noqa: E731
    return ZooTask(NanoGPT, texts(lengths(4)), loss, pad)


class ViT(nn.Module):
    """Patches, a class token, learned positions, pre-norm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.place = nn.Parameter(0.02 * torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], dim=1) + self.place
        return self.head(self.body(h)[:, 0])


@right(rotates=True, long=True)  # an encoder of PyTorch, on patches as a ViT's
def vision_transformer() -> ZooTask:
    return ZooTask(ViT, labelled(3, 8, 8))


class Perceiver(nn.Module):
    """Learned queries, the same for every example, look at the input; an embedding of positions makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Embedding(4, 8)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.RMSNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm(self.latents.weight).expand(len(x), -1, -1)
        return self.head(self.attention(queries, x, x)[0].mean(1))


@right()
def perceiver_with_latents_expanded_over_the_batch() -> ZooTask:
    return ZooTask(Perceiver, SEQUENCES)


class RelativeBias(nn.Module):
    """T5's relative positions: an embedding of [length, length] buckets; and Swin's: an indexed table."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.table = nn.Embedding(9, 2), nn.Parameter(torch.randn(9, 2))
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (2, -1)).transpose(1, 2) for h in self.qkv(x).chunk(3, -1))
        place = torch.arange(x.shape[1])
        bucket = place[:, None] - place + 4
        bias = (self.bias(bucket) + self.table[bucket]).permute(2, 0, 1)
        logits = q @ k.mT / math.sqrt(4) * self.scale.exp() + bias
        return self.head((logits.softmax(-1) @ v).transpose(1, 2).flatten(2).mean(1))


@right()
def attention_with_relative_position_bias() -> ZooTask:
    return ZooTask(RelativeBias, SEQUENCES)


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(6, 4), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).tanh(), self.encode.weight.T, self.bias)


@right()
def autoencoder_with_tied_weights() -> ZooTask:
    return ZooTask(TiedAutoencoder, labelled(6), lambda m, b: (m(b[0]) - b[0]).square().mean(1))


class SharedTowers(nn.Module):
    """Three embeddings of which two are one, in different roles: input, target, output."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.body = nn.Embedding(VOCABULARY, 8), mlp(8, 8)
        self.target = nn.Embedding(VOCABULARY, 8)
        self.target.weight = self.source.weight
        self.out = nn.Linear(8, VOCABULARY)
        self.out.weight = self.source.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.body(self.source(x).mean(1)) + self.target(y))


@right()
def embeddings_tied_three_ways() -> ZooTask:
    words = torch.randint(VOCABULARY, (40, 7), generator=generator())
    rows = [(row[:5], int(row[5]), int(row[6])) for row in words]
    return ZooTask(SharedTowers, rows, lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2], reduction="none"))
