// The latent's channels as pictures: a canvas each, one slider over the latent frames.

import { channelStatistics, latentFrameOf, paintChannel, videoFramesOf } from "./latent.js";
import { byId, make } from "./dom.js";

export class Channels {
  constructor(video) {
    this.video = video;
    this.slider = byId("latent-frame");
    this.follow = byId("follow");
    this.clear();
    this.slider.addEventListener("input", () => {
      this.follow.checked = false; // or the video would take the slider out of the person's hand
      this.draw(Number(this.slider.value));
    });
    this.follow.addEventListener("change", () => this.followVideo(video.currentTime));
    this.watchVideo();
  }

  clear() {
    this.latent = null;
    byId("channels").replaceChildren();
  }

  /** `numFrames` and `fps` are the video's: they tie latent frames to the time that is playing. */
  show(latent, numFrames, fps) {
    this.latent = latent;
    this.numFrames = numFrames;
    this.fps = fps;
    this.frame = null;
    const [C, F, H, W] = latent.shape;
    this.slider.max = F - 1;
    this.slider.disabled = F === 1;
    this.statistics = Array.from({ length: C }, (_, channel) => channelStatistics(latent, channel));
    this.contexts = this.statistics.map(() => make("canvas", { width: W, height: H }).getContext("2d"));
    this.pixels = new ImageData(W, H);
    byId("channels").replaceChildren(...this.statistics.map((statistics, channel) => this.figure(statistics, channel)));
    this.draw(0);
    this.followVideo(this.video.currentTime);
  }

  figure(statistics, channel) {
    const canvas = this.contexts[channel].canvas;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Channel ${channel}`);
    const { mean, std, min, max, notFinite } = statistics;
    const numbers = [`μ ${short(mean)}`, `σ ${short(std)}`, `${short(min)} … ${short(max)}`];
    const caption = make("figcaption", {}, make("b", {}, String(channel)), ...numbers.map((text) => make("span", {}, text)));
    caption.title = `mean ${mean}\nstandard deviation ${std}\nminimum ${min}\nmaximum ${max}`;
    if (notFinite > 0) caption.append(make("em", { className: "problem" }, `${notFinite} not finite`));
    return make("figure", {}, canvas, caption);
  }

  draw(frame) {
    if (frame === this.frame || !this.latent) return;
    this.frame = frame;
    const F = this.latent.shape[1];
    for (const [channel, context] of this.contexts.entries()) {
      paintChannel(this.latent, channel, frame, this.statistics[channel], this.pixels.data);
      context.putImageData(this.pixels, 0, 0);
    }
    const [first, last] = videoFramesOf(frame, F, this.numFrames);
    const frames = first === null ? "" : first === last ? ` · video frame ${first}` : ` · video frames ${first}–${last}`;
    this.slider.value = frame;
    this.slider.setAttribute("aria-valuetext", `${frame}, of 0 to ${F - 1}`);
    byId("latent-frame-label").value = `${frame} of 0–${F - 1}${frames}`;
  }

  followVideo(seconds) {
    if (!this.latent || !this.follow.checked) return;
    const videoFrame = Math.floor(seconds * this.fps + 1e-3);
    this.draw(latentFrameOf(videoFrame, this.latent.shape[1], this.numFrames));
  }

  watchVideo() {
    if (!this.video.requestVideoFrameCallback) {
      this.video.addEventListener("timeupdate", () => this.followVideo(this.video.currentTime));
      return;
    }
    const onFrame = (_, { mediaTime }) => {
      this.followVideo(mediaTime);
      this.video.requestVideoFrameCallback(onFrame);
    };
    this.video.requestVideoFrameCallback(onFrame);
  }
}

/** As many digits as fit under a picture. */
function short(value) {
  const text = Math.abs(value) < 1 ? value.toPrecision(2) : Math.abs(value) < 100 ? value.toFixed(2) : value.toPrecision(4);
  return text.replace("-", "−");
}
