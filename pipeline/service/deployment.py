"""The service on a Ray cluster: replicas of the model behind Ray Serve's HTTP proxy.

A replica admits requests by itself: Serve's own limits stand far above, and only count while no replica is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig

from pipeline.cluster import count_gpu_slots
from pipeline.engine import Engine, ModelInfo, best_device, check_memory_budget, describe_model, load_decoder
from pipeline.errors import ConfigError, PipelineError
from pipeline.service.app import build_app
from pipeline.service.config import ServerConfig, ServiceConfig
from pipeline.service.core import DecoderService
from pipeline.service.datasets import ServedDatasets
from pipeline.service.gate import Gate, TokenDigests, read_token
from pipeline.service.metrics import ServiceMetrics
from pipeline.service.parameters import parse_parameters

logger = logging.getLogger(__name__)

DEPLOYMENT = "Decoder"
_MAX_ONGOING = 1024
_MIN_QUEUED = 64
_METRICS_S = 5.0
_ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b.*: ")
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What a replica decodes with."""

    engine: Engine
    info: ModelInfo
    name: str
    """Tells its videos from another model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaResources:
    """How many replicas there are, and what each holds."""

    replicas: int
    num_gpus: float
    threads: int | None
    """torch threads of a replica."""


ModelLoader = Callable[[ServerConfig, ReplicaResources], LoadedModel]


def load_model(config: ServerConfig, resources: ReplicaResources) -> LoadedModel:
    """The model that the configuration names. Raises: ConfigError."""
    device = best_device() if resources.num_gpus else "cpu"
    info = describe_model(config.vae)
    engine = load_decoder(config.vae, device, resources.threads)
    return LoadedModel(
        engine=engine, info=info, name=f"{info.fingerprint} {config.vae.decoder_dtype} {config.vae.tiling} {device}"
    )


class DecoderReplica:
    """One replica. Other Ray programs call ``decode`` and ``decode_stream`` through a handle, without HTTP."""

    def __init__(
        self, config: ServerConfig, resources: ReplicaResources, digests: TokenDigests | None, load: ModelLoader
    ) -> None:
        logging.getLogger("pipeline").setLevel(config.service.log_level.upper())
        self._app_name = config.service.name
        model = load(config, resources)
        datasets = ServedDatasets(config.datasets, model.info.scaling_factor)
        metrics = ServiceMetrics(serve.get_replica_context().replica_id.unique_id)
        self._service = DecoderService(model.engine, model.info, model.name, config.service, datasets, Gate(digests), metrics)
        self._service.ask_replicas = self._ask_replicas

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._service)

    async def decode(self, body: bytes, parameters: Mapping[str, Any]) -> bytes:
        """The whole video of a safetensors body. Raises: RequestError."""
        return await self._service.decode(body, parse_parameters(parameters))

    async def decode_stream(self, body: bytes, parameters: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """The video of a safetensors body as its bytes come. Raises: RequestError."""
        async for data in self._service.decode_stream(body, parse_parameters(parameters)):
            yield data

    async def metrics_text(self) -> str:
        """This replica's metrics."""
        return await asyncio.to_thread(self._service.metrics.to_text)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self._service.decoder.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()

    async def _ask_replicas(self) -> list[str]:
        handle = serve.get_deployment_handle(DEPLOYMENT, app_name=self._app_name)
        answers = await handle.broadcast("metrics_text").results_async(timeout_s=_METRICS_S, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, str)] or [await self.metrics_text()]


def prepare(config: ServerConfig, environment: Mapping[str, str]) -> TokenDigests | None:
    """What can be found wrong before anything is started; gives what recognises the token.

    Raises:
        ConfigError: the address is open to others and there is no token; the weights cannot be read; the largest video that
            may be asked for does not fit the memory budget.
        DatasetError: a dataset cannot be read.
    """
    digests = read_token(config.service.token_env, environment, required=not config.service.is_loopback)
    model = describe_model(config.vae)
    ServedDatasets(config.datasets, model.scaling_factor)
    side = math.isqrt(config.service.max_pixels) // model.spatial_ratio
    check_memory_budget(config.vae, decode=[(1, model.latent_channels, 5, side, side)])
    return digests


@contextlib.contextmanager
def serving(
    config: ServerConfig, digests: TokenDigests | None, load: ModelLoader = load_model, *, cluster_ends: bool = False
) -> Iterator[str]:
    """Run the service on the cluster that this process has joined; gives its address.

    Args:
        digests: as ``prepare`` gives them.
        cluster_ends: the caller ends the cluster right after, and Ray Serve with it.

    Raises:
        ConfigError: there is no GPU; the port is taken; it runs already; or others chose where this cluster listens, and
            there is no token.
        PipelineError: it does not start; with what Ray Serve says about it.
    """
    service = config.service
    logging.getLogger("ray.serve").setLevel("WARNING")
    others = _find_applications()
    if others is not None and service.name in others:
        others = _replace(service, others)
    if others is not None and digests is None:
        raise ConfigError(
            f"this cluster serves {', '.join(sorted(others))} already, at an address that is not service.host; set "
            f"{service.token_env} to a secret"
        )
    resources = plan_replicas(config)
    try:
        _start_serve(service)
        application = _build_deployment(config, resources).bind(config, resources, digests, load)
        try:
            serve.run(application, name=service.name, route_prefix="/", logging_config=_QUIET)
        except Exception as error:
            raise PipelineError(f"the service does not start: {_explain(service.name) or _last_error(str(error))}") from error
        host = f"[{service.host}]" if ":" in service.host else service.host
        yield f"http://{host}:{service.port}/"
    finally:
        with contextlib.suppress(Exception):
            serve.delete(service.name)
        if others is None and not cluster_ends:
            serve.shutdown()


def plan_replicas(config: ServerConfig) -> ReplicaResources:
    """Share the cluster's GPUs, or its cores, among the replicas.

    Raises:
        ConfigError: there is no GPU although the configuration asks for one.
    """
    wanted = config.service
    slots = count_gpu_slots(config.vae.device, wanted.gpus_per_replica)
    if slots is None:
        replicas, cpus = wanted.replicas or 1, int(ray.cluster_resources().get("CPU", 0))
        return ReplicaResources(replicas=replicas, num_gpus=0, threads=wanted.threads_per_replica or max(1, cpus // replicas))
    if wanted.replicas is not None and wanted.replicas > slots:
        raise ConfigError(
            f"service.replicas is {wanted.replicas}, but {slots} fit the cluster's GPUs; lower it, or service.gpus_per_replica"
        )
    return ReplicaResources(
        replicas=wanted.replicas or slots, num_gpus=wanted.gpus_per_replica, threads=wanted.threads_per_replica
    )


def _build_deployment(config: ServerConfig, resources: ReplicaResources) -> Any:
    service = config.service
    return serve.deployment(
        serve.ingress()(DecoderReplica),
        name=DEPLOYMENT,
        num_replicas=resources.replicas,
        # No CPU: the model's own threads are set, and a replica must find room beside whatever else runs.
        ray_actor_options={"num_cpus": 0, "num_gpus": resources.num_gpus},
        max_ongoing_requests=_MAX_ONGOING,
        # Of these the proxy holds the bodies while no replica is there to read them.
        max_queued_requests=max(_MIN_QUEUED, service.memory_bytes // service.max_body_bytes),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=20,
    )


def _start_serve(service: ServiceConfig) -> None:
    taken = ConfigError(
        f"service.host {service.host}, service.port {service.port}: cannot listen there; another program does, so choose "
        "another service.port"
    )
    if _answers(service.host, service.port):
        raise taken  # another Ray Serve would share the port with this one, each getting some of the requests
    try:
        serve.start(
            proxy_location="HeadOnly" if service.is_loopback else "EveryNode",
            http_options={"host": service.host, "port": service.port},
            logging_config=_QUIET,
        )
    except Exception as error:
        if "Failed to bind" not in str(error):
            raise PipelineError(f"Ray Serve does not start: {_last_error(str(error))}") from error
        raise taken from error


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there already."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):  # 0.0.0.0 leads to this machine
        return True
    return False


def _replace(service: ServiceConfig, running: set[str]) -> set[str] | None:
    """End the application of the same name if that is wanted; gives the others, None: Ray Serve does not run any more."""
    if not service.takeover:
        raise ConfigError(
            f"this cluster serves a {service.name} already, which may be left of a process that was killed; to replace it, "
            f"set service.takeover: true; to end it, call ray.serve.delete({service.name!r}); or choose another service.name"
        )
    logger.warning("replacing application=%s", service.name)
    serve.delete(service.name)
    if others := running - {service.name}:
        return others
    serve.shutdown()  # so that it listens where this configuration says
    return None


def _find_applications() -> set[str] | None:
    """Names of what Ray Serve runs on this cluster; None: it does not run."""
    try:
        status = serve.status()
    except Exception:
        return None
    return set(status.applications) if status.proxies else None


def _explain(name: str) -> str:
    """What Serve knows about an application that does not start."""
    try:
        application = serve.status().applications[name]
    except Exception:
        return ""
    texts = [*(deployment.message for deployment in application.deployments.values()), application.message]
    return _last_error(next((text for text in texts if text), ""))


def _last_error(text: str) -> str:
    """Of a traceback the line that says what happened."""
    lines = [line for line in text.splitlines() if _ERROR_LINE.match(line)]
    return lines[-1] if lines else text
