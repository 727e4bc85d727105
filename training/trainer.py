"""The training loop: draw, reconstruct, learn; log, checkpoint, evaluate, export.

Everything random in a step comes from seed and step, so the only state is in the tensors of the checkpoint.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvae import AutoencoderKLCogVideoX
from cogvae.blocks import SpatialNorm
from training.checkpoint import Checkpoint
from training.config import TrainConfig
from training.data import NamedClip, TrainingData, decode_held_out
from training.evaluate import ClipScore, latent_deviation, mean_scores, score_clips
from training.export import Provenance, export
from training.losses import loss_terms, total_loss
from training.optimizer import RunningAverage, build_optimizers, learning_rate, optimizer_tensors, restore_optimizers

_log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
WEIGHTS = "weights"
_FIRST_LOGVAR = -6.0
_SCALING_STEPS = range(-8, 0)
"""Batches that no step trains on; the latents' scale is measured on them where no clips are held out."""


class Trainer:
    """One run in one folder. Continues from the folder's checkpoint if there is one."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.device = _device(config.run.device)
        self.folder = Path(config.run.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vae = build_vae(config).to(self.device).train()
        self.average = RunningAverage(self.vae, config.optimizer.ema_decay)
        self.optimizers = build_optimizers(self.vae, config.optimizer)
        self.step = 0
        self.num_updates = 0
        self.seconds = 0.0
        self._stop_asked = False
        if (self.folder / CHECKPOINT).exists():
            self._restore(Checkpoint.load(self.folder / CHECKPOINT))
        self.data = TrainingData(config.data, config.shapes, config.run.seed)
        self.held_out: list[NamedClip] = decode_held_out(config.data.held_out) if config.data.held_out else []

    def run(self) -> None:
        """Train up to ``run.steps``; then checkpoint, evaluate and export."""
        settings = self.config.run
        saved = mark = time.monotonic()
        while self.step < settings.steps and not self._stop_asked:
            values = self.train_step()
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % settings.log_every == 0:
                self._write_log({"step": self.step, "seconds": round(self.seconds, 1), **values})
            if now - saved >= settings.checkpoint_every_s:
                self.save()
                saved = now
            if self.step % settings.evaluate_every == 0 and self.step < settings.steps:
                self.evaluate_and_export()
                mark = time.monotonic()  # evaluation is no training time
        self.save()
        if not self._stop_asked:
            self.evaluate_and_export()

    def stop(self) -> None:
        """End after the step at work, with a checkpoint. May be called by a signal handler."""
        self._stop_asked = True

    def train_step(self) -> dict[str, float]:
        """One update. Returns the terms of the loss, its norm of gradient and its learning rate."""
        started = time.monotonic()
        clips = self.data.batch(self.step).to(self.device)
        drawn = time.monotonic()
        terms = self._forward(clips)
        loss = total_loss(terms, self.config.loss)
        self.vae.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.vae.parameters(), self.config.optimizer.clip_norm).item()
        rate = learning_rate(self.step, self.config.run.steps, self.config.optimizer)
        if norm < float("inf"):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            self.average.update(self.vae, self.step)
            self.num_updates += 1
        else:
            _log.warning("update left out step=%d gradient_norm=%s", self.step, norm)
        self.step += 1
        done = time.monotonic()
        return {
            "loss": loss.item(),
            **{name: term.item() for name, term in terms.items()},
            "gradient_norm": norm,
            "learning_rate": rate,
            "data_s": round(drawn - started, 4),
            "step_s": round(done - started, 4),
        }

    def _forward(self, clips_BCTHW: Tensor) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"):
            posterior = self.vae.encode(clips_BCTHW).latent_dist  # type: ignore[union-attr]
            output: Tensor = self.vae.decode(posterior.sample(noise))[0]
        return loss_terms(output, clips_BCTHW, posterior)

    def save(self) -> None:
        """Put the whole run on disk."""
        tensors = {f"model.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        moments = optimizer_tensors(self.optimizers, self.vae)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        scalars = {
            "step": self.step,
            "num_updates": self.num_updates,
            "seconds": self.seconds,
            "seed": self.config.run.seed,
            "vae": self.vae.config.to_json_dict(),
        }
        Checkpoint(tensors, scalars).save(self.folder / CHECKPOINT)
        _log.info("checkpoint written step=%d", self.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        scalars = checkpoint.scalars
        if scalars["seed"] != self.config.run.seed:
            raise ValueError(f"run.seed is {self.config.run.seed}, the run in {self.folder} has {scalars['seed']}")
        expected = {name: tuple(tensor.shape) for name, tensor in self.vae.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in checkpoint.part("model").items()}
        if expected != found:
            raise ValueError(f"{self.folder} holds a run of another architecture: {scalars['vae']}. Choose another run.output.")
        self.vae.load_state_dict(checkpoint.part("model"))
        for name, tensor in checkpoint.part("average").items():
            self.average.tensors[name].copy_(tensor)
        self.step, self.num_updates, self.seconds = scalars["step"], scalars["num_updates"], scalars["seconds"]
        restore_optimizers(self.optimizers, self.vae, checkpoint.part("optimizer"), self.num_updates)
        _log.info("resumed step=%d", self.step)

    def averaged_vae(self) -> AutoencoderKLCogVideoX:
        """The running average as a model of its own, rounded to bfloat16 as it is exported, in float32."""
        vae = AutoencoderKLCogVideoX.from_config(self.vae.config)
        vae.load_state_dict(self.average.tensors)
        return vae.to(torch.bfloat16).float().to(self.device).eval()

    def evaluate_and_export(self) -> list[ClipScore]:
        """Scores of the held-out clips, into the log; weights and model card, into ``weights/``."""
        vae = self.averaged_vae()
        scores = score_clips(vae, self.held_out)
        if scores:
            mean_psnr, mean_ssim = mean_scores(scores)
            per_clip = {score.name: [round(score.psnr, 3), round(score.ssim, 4)] for score in scores}
            entry = {"psnr": mean_psnr, "ssim": mean_ssim, "clips": per_clip}
            self._write_log({"step": self.step, "seconds": round(self.seconds, 1), **entry})
            _log.info("evaluated step=%d psnr=%.2f ssim=%.4f", self.step, mean_psnr, mean_ssim)
        deviation = latent_deviation(vae, [self.data.batch(abs(step) + 2**40) for step in _SCALING_STEPS])
        provenance = Provenance(
            config=self.config,
            step=self.step,
            seconds=self.seconds,
            device=self.device.type,
            num_photos=self.data.num_photos,
            video_names=tuple(self.data.video_names),
            scores=tuple(scores),
        )
        export(vae, self.folder / WEIGHTS, deviation, provenance)
        return scores

    def _write_log(self, entry: dict[str, Any]) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def build_vae(config: TrainConfig) -> AutoencoderKLCogVideoX:
    """The model that training starts from: fresh, or that of ``model.init``."""
    settings = config.model
    if settings.init is not None:
        return AutoencoderKLCogVideoX.from_pretrained(
            settings.init, subfolder=settings.subfolder, storage_options=settings.storage_options
        )
    torch.manual_seed(config.run.seed)
    levels = len(settings.block_out_channels)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        norm_num_groups=settings.norm_num_groups,
        latent_channels=settings.latent_channels,
        sample_height=256,
        sample_width=256,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, SpatialNorm):
                # Begins near a plain norm: torch's own start scales every channel by a random number around zero.
                nn.init.ones_(module.conv_y.conv.bias)  # type: ignore[arg-type]
                nn.init.zeros_(module.conv_b.conv.bias)  # type: ignore[arg-type]
        # Begins nearly without noise: at a deviation of 1 the decoder would see little else.
        vae.encoder.conv_out.conv.bias[settings.latent_channels :] = _FIRST_LOGVAR  # type: ignore[index]
    return vae


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)
