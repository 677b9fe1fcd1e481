"""PyTorch's recurrent layers step by step, out of calls of `F.linear` that per-example gradients can be taken from.

The functions stand for those of torch._VF, with their arguments; dropout is never active in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) or (h, c), each [batch, features]
Step = Callable[[Tensor, State, Sequence[Tensor]], State]  # input's part of the gates, state, weights -> next state


def _biased(weights: Sequence[Tensor], position: int) -> Tensor | None:
    """A bias among w_ih, w_hh, b_ih, b_hh (, w_hr); None where there are none."""
    return weights[position] if len(weights) >= 4 else None


def _lstm_step(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weights[1], _biased(weights, 3))).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    if len(weights) in (3, 5):  # proj_size
        h = F.linear(h, weights[-1])
    return h, c


def _gru_step(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    (h,) = state
    reset, update, new = gates.chunk(3, dim=-1)
    hidden_reset, hidden_update, hidden_new = F.linear(h, weights[1], _biased(weights, 3)).chunk(3, dim=-1)
    update = (update + hidden_update).sigmoid()
    new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    return ((1 - update) * new + update * h,)


def _tanh_step(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    return ((gates + F.linear(state[0], weights[1], _biased(weights, 3))).tanh(),)


def _relu_step(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    return ((gates + F.linear(state[0], weights[1], _biased(weights, 3))).relu(),)


def _forwards(
    gates: Sequence[Tensor], state: State, step: Step, weights: Sequence[Tensor]
) -> tuple[list[Tensor], State]:
    """gates: by time, each [examples that are not at their end yet, n]; the longest examples come first."""
    outputs, ended = [], []
    for at in gates:
        if len(at) < len(state[0]):
            ended.append(tuple(part[len(at) :] for part in state))
            state = tuple(part[: len(at)] for part in state)
        state = step(at, state, weights)
        outputs.append(state[0])
    return outputs, tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))


def _backwards(
    gates: Sequence[Tensor], initial: State, step: Step, weights: Sequence[Tensor]
) -> tuple[list[Tensor], State]:
    outputs, state = [], tuple(part[:0] for part in initial)
    for at in reversed(gates):
        if len(at) > len(state[0]):
            begun = (part[len(state[0]) : len(at)] for part in initial)
            state = tuple(torch.cat(parts) for parts in zip(state, begun, strict=True))
        state = step(at, state, weights)
        outputs.append(state[0])
    return outputs[::-1], state


def _layers(
    x: Tensor,
    cut: Callable[[Tensor], Sequence[Tensor]],
    join: Callable[[Sequence[Tensor]], Tensor],
    hidden: State,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    step: Step,
) -> tuple[Tensor, ...]:
    """cut, join: a sequence to its steps and back.  hidden: each [layers * directions, batch, features]."""
    directions = 1 + bidirectional
    each = len(weights) // (layers * directions)
    last: list[State] = []
    for layer in range(layers):
        results = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * each : (number + 1) * each]
            gates = cut(F.linear(x, own[0], own[2] if has_biases else None))
            initial = tuple(part[number] for part in hidden)
            outputs, state = (_backwards if direction else _forwards)(gates, initial, step, own)
            results.append(join(outputs))
            last.append(state)
        x = torch.cat(results, dim=-1)
    return x, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _sequence(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """torch._VF's function of a layer type, for padded and for packed sequences."""

    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        # (sizes,) hidden, weights, has_biases, layers, dropout, training, bidirectional (, batch_first)
        packed = isinstance(args[2], list | tuple)
        sizes, (hidden, weights, has_biases, layers, _dropout, _training, bidirectional, *rest) = (
            (args[0], args[1:]) if packed else (None, args)
        )
        state = tuple(hidden) if isinstance(hidden, list | tuple) else (hidden,)
        options = (state, weights, has_biases, layers, bidirectional, step)
        if sizes is not None:
            lengths = sizes.tolist()
            return _layers(x, lambda sequence: sequence.split(lengths), lambda steps: torch.cat(list(steps)), *options)
        time = 1 if rest[0] else 0  # batch_first
        return _layers(
            x, lambda sequence: sequence.unbind(time), lambda steps: torch.stack(list(steps), dim=time), *options
        )

    return run


lstm, gru = _sequence(_lstm_step), _sequence(_gru_step)
rnn_tanh, rnn_relu = _sequence(_tanh_step), _sequence(_relu_step)


def lstm_cell(x: Tensor, state: State, *weights: Tensor | None) -> State:
    present = [weight for weight in weights if weight is not None]
    return _lstm_step(F.linear(x, present[0], _biased(present, 2)), tuple(state), present)


def _cell(step: Step) -> Callable[..., Tensor]:
    def run(x: Tensor, h: Tensor, *weights: Tensor | None) -> Tensor:
        present = [weight for weight in weights if weight is not None]
        return step(F.linear(x, present[0], _biased(present, 2)), (h,), present)[0]

    return run


gru_cell, rnn_tanh_cell, rnn_relu_cell = _cell(_gru_step), _cell(_tanh_step), _cell(_relu_step)
