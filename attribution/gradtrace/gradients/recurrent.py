"""PyTorch's recurrent layers written step by step with `F.linear`, whose calls give the factors of gradients.

`REPLACEMENTS` of functions of torch._VF take the same arguments. Dropout is ignored: it is inactive in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) or (h, c), each [batch, features]
Step = Callable[[Tensor, State, Sequence[Tensor]], State]  # gates W_ih x + b_ih, state, weights -> next state


def _bias(weights: Sequence[Tensor], position: int) -> Tensor | None:
    """A bias among w_ih, w_hh, b_ih, b_hh (, w_hr); None for a layer without biases."""
    return weights[position] if len(weights) >= 4 else None


def _lstm_step(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weights[1], _bias(weights, 3))).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    if len(weights) in (3, 5):  # proj_size
        h = F.linear(h, weights[-1])
    return h, c


def _gru_step(gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    (h,) = state
    reset, update, new = gates.chunk(3, dim=-1)
    hidden_reset, hidden_update, hidden_new = F.linear(h, weights[1], _bias(weights, 3)).chunk(3, dim=-1)
    update = (update + hidden_update).sigmoid()
    new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    return ((1 - update) * new + update * h,)


def _rnn_step(activation: Callable[[Tensor], Tensor], gates: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    return (activation(gates + F.linear(state[0], weights[1], _bias(weights, 3))),)


def _outputs(
    gates: Sequence[Tensor], initial: State, step: Step, weights: Sequence[Tensor]
) -> tuple[list[Tensor], State]:
    """Outputs of each time step, and the last state. gates: of each step, in either direction of time, for as many of
    the examples as are of that length or more; the longest examples come first."""
    outputs, ended = [], []
    state = tuple(values[:0] for values in initial)
    for step_gates in gates:
        running, count = len(state[0]), len(step_gates)
        if count > running:
            starting = (values[running:count] for values in initial)
            state = tuple(torch.cat(values) for values in zip(state, starting, strict=True))
        elif count < running:
            ended.append(tuple(values[count:] for values in state))
            state = tuple(values[:count] for values in state)
        state = step(step_gates, state, weights)
        outputs.append(state[0])
    return outputs, tuple(torch.cat(values) for values in zip(state, *reversed(ended), strict=True))


def _layers(
    x: Tensor,
    split: Callable[[Tensor], Sequence[Tensor]],
    join: Callable[[list[Tensor]], Tensor],
    hidden: State,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    step: Step,
) -> tuple[Tensor, ...]:
    """Outputs of the last layer, and the last state of all layers, each [layers * directions, batch, features].

    split, join: a sequence to its time steps and back.  hidden: as the last state
    """
    directions = 1 + bidirectional
    per_direction = len(weights) // (layers * directions)
    last_states: list[State] = []
    for layer in range(layers):
        results = []
        for direction in range(directions):
            number = layer * directions + direction
            chosen = weights[number * per_direction : (number + 1) * per_direction]
            gates = split(F.linear(x, chosen[0], chosen[2] if has_biases else None))
            initial = tuple(values[number] for values in hidden)
            order = slice(None, None, -1 if direction else 1)  # of time
            outputs, state = _outputs(gates[order], initial, step, chosen)
            results.append(join(outputs[order]))
            last_states.append(state)
        x = torch.cat(results, dim=-1)
    return x, *(torch.stack(values) for values in zip(*last_states, strict=True))


def _sequence(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """The replacement of a function of torch._VF, for padded and for packed sequences."""

    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        # (sizes,) hidden, weights, has_biases, layers, dropout, training, bidirectional (, batch_first)
        packed = isinstance(args[2], list | tuple)
        hidden, weights, has_biases, layers, _dropout, _training, bidirectional = args[packed : packed + 7]
        split: Callable[[Tensor], Sequence[Tensor]]
        join: Callable[[list[Tensor]], Tensor]
        if packed:
            split, join = partial(torch.split, split_size_or_sections=args[0].tolist()), torch.cat
        else:
            time = 1 if args[7] else 0
            split, join = partial(torch.unbind, dim=time), partial(torch.stack, dim=time)
        state = tuple(hidden) if isinstance(hidden, list | tuple) else (hidden,)
        return _layers(x, split, join, state, weights, has_biases, layers, bidirectional, step)

    return run


def _cell(step: Step) -> Callable[..., Tensor | State]:
    """The replacement of a function of torch._VF for a single time step."""

    def run(x: Tensor, hidden: Any, *weights: Tensor | None) -> Tensor | State:
        present = [weight for weight in weights if weight is not None]
        several = isinstance(hidden, list | tuple)
        state = step(F.linear(x, present[0], _bias(present, 2)), tuple(hidden) if several else (hidden,), present)
        return state if several else state[0]

    return run


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": partial(_rnn_step, torch.tanh),
    "rnn_relu": partial(_rnn_step, torch.relu),
}
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **{getattr(torch._VF, name): _sequence(step) for name, step in _STEPS.items()},
    **{getattr(torch._VF, f"{name}_cell"): _cell(step) for name, step in _STEPS.items()},
}
