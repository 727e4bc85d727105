#!/usr/bin/env python3
"""Serve a VAE and latent datasets over HTTP: latents in, videos out, and a page to look at datasets.

    python jobs/serve_decoder.py --config configs/serve.yaml --vae.weights THUDM/CogVideoX-5b --vae.subfolder vae

Ctrl-C stops it.
"""

import contextlib
import logging
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.account import ExitCode
from pipeline.cluster import ray_cluster, stop_on_signals
from pipeline.errors import ConfigError, PipelineError
from pipeline.progress import LogHandler
from pipeline.service.command_line import parse_server_config
from pipeline.service.deployment import prepare, serving

_AFTER = "on a shared cluster the service may go on: service.takeover replaces it"


def main(arguments: list[str]) -> int:
    config = parse_server_config(arguments)
    logging.basicConfig(level="WARNING", handlers=[LogHandler()])
    logging.getLogger("pipeline").setLevel(config.service.log_level.upper())
    stop = threading.Event()
    try:
        digests = prepare(config, os.environ)
        os.environ.pop(config.service.token_env, None)  # the processes of a private Ray inherit the rest
        is_private = os.environ.get("RAY_ADDRESS", "local") == "local"
        with contextlib.ExitStack() as running:
            running.enter_context(stop_on_signals(stop, _AFTER))
            running.enter_context(ray_cluster())
            running.enter_context(stop_on_signals(stop, _AFTER))  # once more: ray.init puts its own handlers in place
            url = running.enter_context(serving(config, digests, cluster_ends=is_private))
            print(f"ready: {url} is the viewer, {url}docs says what programs can ask; Ctrl-C stops", flush=True)
            stop.wait()
            print("stopping", flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.COMPLETE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
