#!/usr/bin/env python3
"""Train a small CogVideoX VAE, or fine-tune a published one. The same command resumes.

python jobs/train_vae.py --config configs/training/small.yaml
python jobs/train_vae.py --run.output runs/tuned --model.init zai-org/CogVideoX-2b --model.subfolder vae --data.videos FOLDER
"""

import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import ValidationError
from pydantic_settings import CliApp

from pipeline.command_line import load_config_file
from pipeline.errors import PipelineError
from pipeline.progress import LogHandler
from training.config import TrainConfig
from training.trainer import Trainer


def main(arguments: list[str]) -> int:
    try:
        values = {}
        if arguments[:1] == ["--config"]:
            values, arguments = load_config_file(arguments[1]), arguments[2:]
        config = CliApp.run(TrainConfig, cli_args=arguments, **values)
    except (PipelineError, ValidationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level="WARNING", handlers=[LogHandler()])
    logging.getLogger("training").setLevel("INFO")
    try:
        trainer = Trainer(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: trainer.stop())
        trainer.run()
    except (ValueError, OSError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
