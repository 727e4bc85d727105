from __future__ import annotations

import subprocess
import sys

import pipeline.dataset


def test_writing_and_publishing_import_neither_torch_nor_ray_nor_the_model() -> None:
    check = "import sys, pipeline.dataset; print({'torch', 'ray', 'cogvae'} & {name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there() -> None:
    assert all(getattr(pipeline.dataset, name) for name in pipeline.dataset.__all__)
