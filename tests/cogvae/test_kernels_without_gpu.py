"""What can be shown of the Triton kernels without a GPU: they run in the interpreter, compile, and stay out of the way."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogvae import exact, kernels
from cogvae.exact.memory import find_plan
from cogvae.kernels import choose_triton, find_operations, twins

from .pairs import make_tiny

ROOT = Path(__file__).resolve().parents[2]
# The only platform of which the tests require Triton; it must not be missing there.
HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64"
needs_triton = pytest.mark.skipif(not HAS_WHEELS, reason="Triton is for Linux on x86_64")

COMPILE = """
import json, re
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cogvae.kernels import programs

CHANNEL_STRIDES = ("x_c", "residual_c", "out_c", "scale_c", "shift_c")

def build(program, pointers, constants, capability):
    constants = {**constants, **{name: 1 for name in CHANNEL_STRIDES if name in program.arg_names}}
    types = {n: "*" + pointers[n] if n in pointers else "constexpr" if n in constants else "i32" for n in program.arg_names}
    known = [p.num for p in program.params if types[p.name] != "constexpr" and not p.do_not_specialize]
    aligned = {(i,): [["tt.divisibility", 16]] for i in known}
    source = ASTSource(program, types, {(program.arg_names.index(n),): value for n, value in constants.items()}, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm

tile, found = {"WIDE": tl.float32, "CELLS": 32, "CHANNELS": 128}, []
for capability in (80, 90):
    for dtype in ("fp32", "fp16", "bf16"):
        wide = dict.fromkeys(("means", "squares", "group_means", "group_squares", "scale", "shift"), "fp32")
        both = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "REPEAT": 2}
        given = {**wide, **dict.fromkeys(("x", "bias", "residual", "out"), dtype)}
        for program, constants in (
            (programs.finish_splits, {**tile, **both}),
            (programs.scale_shift_silu, tile),
            (programs.merge_splits, {"WIDE": tl.float32, "SPLITS": 64, "CHANNELS": 16}),
        ):
            asm = build(program, given, constants, capability)
            widest = sorted(set(re.findall(r"(ld|st)[.]global[.]v4[.]b32", asm["ptx"])))
            found.append([program.fn.__name__, len(asm["cubin"]) > 0, widest])
print(json.dumps(found))
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_triton
@pytest.mark.timeout(900)
def test_the_kernels_pass_their_tests_under_the_interpreter() -> None:
    # It must be on before Triton is imported, and would stay on for every other test of this process.
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cogvae/test_kernels.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


@needs_triton
def test_the_kernels_compile_for_a_gpu_and_move_16_bytes_at_once(tmp_path: Path) -> None:
    result = run_python("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 18
    for name, has_code, widest in found:
        assert has_code, name
        assert name == "merge_splits" or widest == ["ld", "st"], name


def test_triton_is_not_imported_before_a_kernel_is_called() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; import cogvae; from cogvae.kernels import find_operations;"
        "vae = cogvae.AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1);"
        "torch.set_grad_enabled(False); vae(torch.zeros(1, 3, 1, 8, 8)); print(find_operations(False).__name__)"
    )
    result = run_python("-c", code)
    assert result.stdout.strip() == "cogvae.kernels.twins", result.stderr


def test_kernels_are_chosen_on_cuda_where_triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device(name) for name in ("cuda", "cpu", "meta")]
    monkeypatch.setattr(kernels, "_can_launch", lambda device: True)
    for is_installed, expected in ((True, [True, False, False]), (False, [False] * 3)):
        monkeypatch.setattr(kernels, "_has_triton", lambda answer=is_installed: answer)
        assert [choose_triton(None, device) for device in devices] == expected
        assert [choose_triton(False, device) for device in devices] == [False] * 3
    with pytest.raises(ImportError, match="use_triton=True, but triton is not installed"):
        choose_triton(True, devices[0])
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    assert [choose_triton(True, device) for device in (devices[0], devices[2])] == [True, False]
    assert find_operations(False) is twins


def test_kernels_that_are_wanted_on_a_processor_run_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    vae = make_tiny()
    vae.use_triton = True
    with torch.no_grad(), pytest.raises(ValueError, match="the model is on cpu: Triton kernels need a CUDA device"):
        vae.decode(torch.randn(1, 4, 1, 1, 1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_triton(True, torch.device("cpu"))


def test_a_gpu_for_which_triton_builds_nothing_gets_the_twins_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(triton: bool) -> None:
        raise RuntimeError("no C compiler")

    device = torch.device("cuda", 7)
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(kernels, "find_operations", fail)
    kernels._can_launch.cache_clear()
    assert [choose_triton(None, device) for _ in range(2)] == [False, False]
    assert choose_triton(True, device)  # and its error when it runs
    (record,) = caplog.records
    assert "plain PyTorch does their work device=cuda:7 error=RuntimeError('no C compiler')" in record.message
    kernels._can_launch.cache_clear()


def test_the_models_switch_reaches_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make_tiny()
    asked: list[bool | None] = []
    monkeypatch.setattr(exact.memory, "choose_triton", lambda wanted, device: bool(asked.append(wanted)))
    z = torch.randn(1, 4, 1, 1, 1)
    with torch.no_grad():
        for vae.use_triton in (None, False, True):  # type: ignore[assignment]
            vae.enable_tiling(mode="exact", strip_rows=3)
            vae.decode(z)
            vae.encode(torch.randn(1, 3, 1, 8, 8))
    assert asked == [None, None, False, False, True, True]
    plan = find_plan(exact.Limits(triton=False), vae.decoder, z, True)
    assert not plan.triton
    assert not plan.leaves_bias
