"""Compiled networks: which modes are taken, that the numbers stay, and that nothing is compiled again in every step."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
from every_method import COMPILABLE, build
from tiny import SMALL, VIL, Steps, pictures, state, supervised, trainer

from vil_lightning.cli import build_cli
from vil_lightning.errors import ConfigError
from vil_lightning.methods.compiling import (
    begin_step,
    check_compile,
    compile_blocks,
    compile_function,
    compile_network,
    outside_of_graphs,
)

WHOLE = ["dino", "lejepa", "distillation", "supervised"]
BY_BLOCKS = ["ibot", "dinov2", "mae", "simmim", "autoregressive"]


class Compiler:
    """Counts how often a graph is compiled, and runs it as it is: the real backend needs a C++ compiler, and a minute."""

    def __init__(self) -> None:
        self.count = 0
        self.options: list[dict[str, Any]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    """torch.compile with a counting backend; where it gives up and runs uncompiled code is an error."""
    counting, original, config = Compiler(), torch.compile, torch._dynamo.config

    def compile(function: Callable[..., Any], **options: Any) -> Any:
        counting.options.append(options)
        return original(function, backend=counting)

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    # The limits, which compiling raises, are those of the process.
    settings = {
        "recompile_limit": config.recompile_limit,
        "accumulated_recompile_limit": config.accumulated_recompile_limit,
    }
    with config.patch(fail_on_recompile_limit_hit=True, **settings):
        yield counting
    torch._dynamo.reset()


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILABLE)
def test_mode__an_unknown_one_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.compile='fast' must be true, false, or one of default, reduce-over"):
        build(name, tmp_path, compile="fast")


@pytest.mark.parametrize("name", WHOLE)
def test_mode__cuda_graphs_need_a_cuda_device(name: str, tmp_path: Path, compiler: Compiler) -> None:
    module, data = build(name, tmp_path, compile="reduce-overhead")
    with pytest.raises(ConfigError, match=r"model\.compile=reduce-overhead .* device cpu .*trainer\.accelerator=gpu"):
        trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert compiler.count == 0


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_mode__no_cuda_graphs_of_single_blocks(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.compile=reduce-overhead: this method compiles .* block by block"):
        build(name, tmp_path, compile="reduce-overhead")


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_mode__no_cuda_graphs_of_accumulated_gradients(mode: Any) -> None:
    def module(batches: int) -> Any:
        strategy = SimpleNamespace(root_device=torch.device("cuda"))
        return SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, accumulate_grad_batches=batches))

    check_compile(module(1), mode)
    check_compile(module(2), True)
    check_compile(module(2), False)
    with pytest.raises(ConfigError, match=rf"model\.compile={mode} .*trainer\.accumulate_grad_batches=2"):
        check_compile(module(2), mode)


@pytest.mark.parametrize(
    ("mode", "whole", "blocks"),
    [
        (False, None, None),
        (True, {}, {}),
        ("default", {}, {}),
        ("max-autotune", {"mode": "max-autotune"}, {"mode": "max-autotune-no-cudagraphs"}),
        ("reduce-overhead", {"mode": "reduce-overhead"}, None),
    ],
)
def test_mode__what_the_compiler_is_asked_for(mode: Any, whole: Any, blocks: Any, compiler: Compiler) -> None:
    network = timm.create_model(VIL, **SMALL)
    compile_network(network, mode)
    function = compile_function(torch.sin, mode)
    assert compiler.options == ([] if whole is None else [whole, whole])
    assert (function is torch.sin) == (mode is False)
    compiler.options.clear()
    if mode != "reduce-overhead":
        compile_blocks(network, mode)
        assert compiler.options == ([] if blocks is None else [blocks] * len(network.blocks))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("max-autotune", "max-autotune")])
def test_mode__on_the_command_line(text: str, value: Any) -> None:
    for recipe in ("train_supervised", "pretrain_mae"):
        cli = build_cli(["--config", f"configs/{recipe}.yaml", "--model.compile", text], run=False)
        assert cli.model.compile_mode == value


def test_mode__an_unknown_one_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_cli(["--config", "configs/train_supervised.yaml", "--model.compile", "fast"], run=False)
    error = capsys.readouterr().err
    assert "compile" in error
    assert "reduce-overhead" in error


# --- memory of CUDA graphs --------------------------------------------------------------------------------------------


def test_outside_of_graphs__outputs_survive_the_next_call() -> None:
    """What a graph returns lies in the same memory every time."""
    memory = torch.zeros(3)
    function = outside_of_graphs(lambda x: {"a": (memory.copy_(x), "text")})
    first, second = function(torch.ones(3)), function(torch.full((3,), 2.0))
    assert first["a"][0].tolist() == [1, 1, 1]
    assert second["a"][0].tolist() == [2, 2, 2]
    assert first["a"][1] == "text"
    x = torch.ones(2, requires_grad=True)
    outside_of_graphs(lambda x: 2 * x)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]


@pytest.mark.parametrize("name", ["dino", "distillation", "lejepa", "supervised"])
def test_begin_step__memory_is_given_up_only_while_no_backward_pass_needs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is announced at its start, and by the teacher before the student has run."""
    events: list[str] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: events.append("mark"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    module, data = build(name, tmp_path, compile="max-autotune")
    backward = L.LightningModule.backward
    monkeypatch.setattr(L.LightningModule, "backward", lambda *args: (events.append("backward"), backward(*args)))
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(module, datamodule=data)
    teacher = name in ("dino", "distillation")
    assert events == [*["mark"] * (2 if teacher else 1), "backward"] * 2


def test_begin_step__without_graphs_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: pytest.fail("marked"))
    begin_step(False)
    begin_step(True)
    begin_step("default")


# --- compiled once ----------------------------------------------------------------------------------------------------


class Counts(L.Callback):
    """How many graphs every step has compiled."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler, self.before, self.counts = compiler, 0, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(self.compiler.count - self.before)
        self.before = self.compiler.count


QUICK = ("dino",)  # two sizes, two networks, drop path of half a batch


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COMPILABLE])
def test_step__is_compiled_once(name: str, tmp_path: Path, compiler: Compiler) -> None:
    module, data = build(name, tmp_path, compile=True)
    counts = Counts(compiler)
    trainer(tmp_path, max_steps=4, max_epochs=2, callbacks=[counts]).fit(module, datamodule=data)
    assert counts.counts[0] > 0
    assert counts.counts[1:] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("by_blocks", [True, False])
def test_network__other_sizes_and_batches_are_compiled_for_once(by_blocks: bool, compiler: Compiler) -> None:
    """The second size is compiled for as any size; so is a smaller last batch, also where drop path leaves out images."""
    network = timm.create_model(VIL, **{**SMALL, "patch_size": 4, "drop_path_rate": 0.5, "num_classes": 0}).train()
    (compile_blocks if by_blocks else compile_network)(network, True)
    counts = []
    for batch, size in [(8, 16), (8, 16), (8, 8), (8, 24), (8, 12), (6, 16), (4, 24), (10, 8), (8, 16)]:
        before = compiler.count
        network(torch.randn(batch, 3, size, size)).sum().backward()
        counts.append(compiler.count - before)
    assert counts[0] > 0
    assert counts[1] == 0
    assert counts[2] > 0
    assert sum(counts[3:]) <= 2  # a batch of which drop path leaves out nobody, say, is another case
    assert counts[-1] == 0


@pytest.mark.slow
def test_blocks__of_many_rates_of_drop_path_stay_within_the_limit(compiler: Compiler) -> None:
    """Blocks share their code, and each rate is a variant of it: more than the compiler keeps by itself."""
    kwargs = {**SMALL, "depth": 9, "embed_dim": 16, "drop_path_rate": 0.5, "drop_path_decay": True}
    network = timm.create_model(VIL, **kwargs).train()
    assert len({getattr(block.drop_path, "drop_prob", 0) for block in network.blocks}) == 9 > 8
    compile_blocks(network, True)
    for size in (16, 8):
        network(torch.randn(4, 3, size, size)).sum().backward()
    assert compiler.count > 8  # and none was refused, which would be an error here


# --- the real compiler ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, "max-autotune"])
def test_step__compiled_equals_eager(mode: Any, tmp_path: Path) -> None:
    results = []
    for compile in (False, mode):
        torch._dynamo.reset()
        steps, model = Steps(), supervised(ema_decay=0.9, lr_warmup=0, compile=compile)
        trainer(tmp_path, max_steps=2, callbacks=[steps]).fit(model, datamodule=pictures())
        results.append((steps.losses, state(model)))
    (losses, eager), (compiled_losses, compiled) = results
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    for name, value in eager.items():
        torch.testing.assert_close(
            compiled[name], value, rtol=1e-3, atol=1e-4, msg=functools.partial("{}: {}".format, name)
        )
