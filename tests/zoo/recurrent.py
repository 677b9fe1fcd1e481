"""LSTM, GRU, RNN and their cells."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from zoo.case import ZooTask, right
from zoo.data import VOCABULARY, labelled, lengths, pad_with_lengths, texts

SEQUENCES = labelled(5, 6)


class Recurrent(nn.Module):
    """Reads a sequence; classifies its last output, or its last hidden (and cell) state."""

    def __init__(self, kind: str, reads: str = "output", batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.body = getattr(nn, kind)(6, 8, batch_first=batch_first, **options)
        self.reads, self.batch_first = reads, batch_first
        self.head = nn.LazyLinear(3)
        self(torch.zeros(2, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.body(x if self.batch_first else x.transpose(0, 1))
        if self.reads == "output":
            return self.head(output[:, -1] if self.batch_first else output[-1])
        return self.head(torch.cat(state, 2)[-1] if isinstance(state, tuple) else state[-1])


for name, options in {
    "lstm": {"kind": "LSTM"},
    "gru": {"kind": "GRU"},
    "rnn": {"kind": "RNN"},
    "rnn_relu_without_bias": {"kind": "RNN", "nonlinearity": "relu", "bias": False},
    "lstm_two_layers_bidirectional": {"kind": "LSTM", "num_layers": 2, "bidirectional": True},
    "gru_two_layers_bidirectional": {"kind": "GRU", "num_layers": 2, "bidirectional": True, "reads": "state"},
    "lstm_projected": {"kind": "LSTM", "proj_size": 4, "num_layers": 2},
    "lstm_time_first": {"kind": "LSTM", "batch_first": False},
    "gru_time_first_hidden_state": {"kind": "GRU", "batch_first": False, "reads": "state"},
    "lstm_hidden_state": {"kind": "LSTM", "reads": "state"},
    "lstm_dropout_between_layers": {"kind": "LSTM", "num_layers": 2, "dropout": 0.3},
}.items():
    rotates = name in ("lstm", "gru", "rnn", "lstm_two_layers_bidirectional")
    right(name, rotates=rotates, long=name == "gru_two_layers_bidirectional")(
        partial(lambda options: ZooTask(lambda: Recurrent(**options), SEQUENCES), options)
    )


class Packed(nn.Module):
    """A packed sequence: examples of a time step lie side by side, longest first."""

    def __init__(self, kind: str, sorts: bool, reads: str = "state", **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.body = getattr(nn, kind)(6, 8, batch_first=True, **options)
        self.head = nn.Linear(8 * (2 if options.get("bidirectional") and reads == "output" else 1), 3)
        self.sorts, self.reads = sorts, reads

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        order = size.argsort(descending=True, stable=True) if self.sorts else torch.arange(len(x))
        packed = pack_padded_sequence(self.embed(x[order]), size[order], batch_first=True, enforce_sorted=self.sorts)
        output, state = self.body(packed)
        if self.reads == "output":  # a maximum over time
            padded, _ = pad_packed_sequence(output, batch_first=True, padding_value=-torch.inf)
            return self.head(padded.amax(1))[order.argsort()]
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])[order.argsort()]


def by_length(m: nn.Module, b: Any) -> Tensor:
    return nn.functional.cross_entropy(m(b[0], b[1]), b[2], reduction="none")


for name, options in {
    "packed_lstm_unsorted": {"kind": "LSTM", "sorts": False},
    "packed_lstm_sorted_and_put_back": {"kind": "LSTM", "sorts": True},
    "packed_gru_outputs": {"kind": "GRU", "sorts": False, "reads": "output"},
    "packed_rnn": {"kind": "RNN", "sorts": False},
    "packed_lstm_bidirectional": {"kind": "LSTM", "sorts": False, "reads": "output", "bidirectional": True},
}.items():
    right(name, rotates=name == "packed_lstm_unsorted")(
        partial(
            lambda options: ZooTask(lambda: Packed(**options), texts(lengths(2)), by_length, pad_with_lengths), options
        )
    )


@right()
def packed_by_the_collate_function() -> ZooTask:
    """The batch itself holds a PackedSequence."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: nn.utils.rnn.PackedSequence) -> Tensor:
            return self.head(self.body(x)[1][-1])

    rows = [(torch.cat([x] * 2)[:size], y) for (x, y), size in zip(SEQUENCES, lengths(2, 9), strict=True)]
    collate = lambda ex: (pack_sequence([x for x, _ in ex], enforce_sorted=False), torch.tensor([y for _, y in ex]))  # noqa: E731
    return ZooTask(Reader, rows, collate=collate)


class Cells(nn.Module):
    """A loop over time steps; the same cell is used once for each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head = getattr(nn, f"{kind}Cell")(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


for kind in ("LSTM", "GRU", "RNN"):
    right(f"{kind.lower()}_cell_in_a_loop")(lambda kind=kind: ZooTask(lambda: Cells(kind), SEQUENCES))


class LearnedStart(nn.Module):
    """The first hidden state is a parameter, expanded over the batch; the decoder is fed its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 1, 8))
        self.encoder, self.decoder, self.head = nn.GRU(6, 8, batch_first=True), nn.GRUCell(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.encoder(x, self.start.expand(-1, len(x), -1).contiguous())
        h, y = state[0], x.new_zeros(len(x), 3)
        for _ in range(3):
            h = self.decoder(y, h)
            y = self.head(h)
        return y


@right()
def seq2seq_with_a_learned_first_state() -> ZooTask:
    return ZooTask(LearnedStart, SEQUENCES)


class ConvLSTM(nn.Module):
    """One convolution, re-used at every time step."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = nn.Conv2d(2 + 3, 12, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 3, *x.shape[3:])
        for frame in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h.mean((2, 3)))


@right()
def convolutional_lstm() -> ZooTask:
    return ZooTask(ConvLSTM, labelled(4, 2, 6, 6))
