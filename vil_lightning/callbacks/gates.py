"""What the gates of a Vision-LSTM do with its tokens."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# At the start, forget gates are sigmoid(3) to sigmoid(6) = 0.953 to 0.998 and input gates exp(-0.3) to exp(0.3).
SHUT_BELOW = 0.01  # a forget gate that keeps less than this of the memory at every token: the scan sees one token
STUCK_ABOVE = 1 - 1e-5  # one that forgets less: its gradient, in proportion to what it forgets, is gone
EXTREME = 15.0  # pre-activation of an input gate: one token outweighs another by e^15
STATES = ("fgate_shut", "fgate_stuck", "igate_extreme")


class GateWatch:
    """Counts in which state gates are, of every mLSTM branch that runs while it watches.

    A branch is a module with `igate` and `fgate`, which are linear maps of [q; k; v], and with `q_proj`, `k_proj`, `v_proj`.

    Args:
        network: Of which all branches are watched.
    """

    def __init__(self, network: nn.Module) -> None:
        self.branches: dict[str, Any] = {
            name: module
            for name, module in network.named_modules()
            if all(hasattr(module, part) for part in ("igate", "fgate", "q_proj", "k_proj", "v_proj"))
        }
        self._inputs: dict[str, dict[str, Tensor]] = {name: {} for name in self.branches}
        self._shares: dict[str, list[Tensor]] = {name: [] for name in self.branches}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all forward passes in this context."""
        with ExitStack() as stack:
            if self.branches:
                # A compiled network would pass hooks by that were not there when it was compiled.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, branch in self.branches.items():
                for part in ("q", "k", "v"):
                    projection = getattr(branch, f"{part}_proj")
                    hook = projection.register_forward_hook(partial(self._keep, name, part))
                    stack.callback(hook.remove)
                stack.callback(branch.register_forward_hook(partial(self._measure, name)).remove)
            yield

    def take(self) -> Tensor:
        """Shares (B, branches, 3) of tokens and heads in each of `STATES`, since the last call; forgets them.

        A branch that ran more than once (shared by several scans) counts with its mean.
        """
        shares = torch.stack([torch.stack(passes).mean(0) for passes in self._shares.values()], dim=1)
        for passes in self._shares.values():
            passes.clear()
        return shares

    def _keep(self, name: str, part: str, module: nn.Module, args: Any, output: Tensor) -> None:
        # What is computed for heads comes as (B, NH, S, DH).
        self._inputs[name][part] = output.transpose(1, 2).flatten(2) if output.ndim == 4 else output

    def _measure(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        qkv = [self._inputs[name].pop(part).float() for part in ("q", "k", "v")]
        branch = self.branches[name]
        with torch.autocast(output.device.type, enabled=False):
            igate, fgate = (_preactivation(gate, qkv) for gate in (branch.igate, branch.fgate))  # (B, S, NH)
        states = (
            fgate.sigmoid() < SHUT_BELOW,
            (-fgate).sigmoid() < 1 - STUCK_ABOVE,  # 1 - sigmoid, without its rounding
            igate.abs() > EXTREME,
        )
        self._shares[name].append(torch.stack([state.float().mean((1, 2)) for state in states], dim=1))


def _preactivation(gate: nn.Linear, qkv: list[Tensor]) -> Tensor:
    """`gate([q; k; v])` in float32, without building the concatenation."""
    weights = gate.weight.float().chunk(3, dim=1)
    product = sum(F.linear(x, weight) for x, weight in zip(qkv, weights, strict=True))
    return product + gate.bias.float()
