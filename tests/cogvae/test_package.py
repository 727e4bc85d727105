import ast
import subprocess
import sys
from pathlib import Path

import cogvae


def test_the_public_names_are_these() -> None:
    assert cogvae.__all__ == [
        "AutoencoderKLCogVideoX",
        "AutoencoderKLOutput",
        "DecoderOutput",
        "DiagonalGaussianDistribution",
        "VAEConfig",
        "WeightFiles",
        "resolve_weights",
    ]
    assert all(hasattr(cogvae, name) for name in cogvae.__all__)


def test_importing_the_package_imports_torch_numpy_and_safetensors_alone() -> None:
    code = "import sys, cogvae, cogvae.sat; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    imported = {name.partition(".")[0] for name in found.split()}
    assert "cogvae" in imported
    unwanted = {
        "diffusers",
        "transformers",
        "accelerate",
        "huggingface_hub",
        "fsspec",
        "ray",
        "pyarrow",
        "av",
    }
    assert not imported & (unwanted | {"pipeline", "jobs"})


def test_the_package_imports_where_there_are_no_posix_modules() -> None:
    # torch and numpy come first: what they import is theirs to choose.
    code = "import sys, torch, numpy, safetensors.torch; sys.modules['fcntl'] = None; import cogvae, cogvae.sat"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pickles_are_loaded_with_weights_only() -> None:
    for path in Path(cogvae.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "pickle.load",
                "pickle.loads",
            ):
                assert "weights_only=True" in ast.unparse(node), path
