// The pane of one sample: video, source frame, latent channels, metadata.

import { pause, request, requestJson, samplePath } from "./api.js";
import { Channels } from "./channels.js";
import { byId, copyText, formatNumber, formatValue, make } from "./dom.js";
import { parseLatent, videoLength } from "./latent.js";
import { loadInto, showState } from "./state.js";

// Who holds down "next" passes samples faster than this, and none of those is decoded.
const SETTLE_MS = 150;

export class Detail {
  constructor() {
    this.video = byId("video");
    this.channels = new Channels(this.video);
    this.controller = new AbortController();
    byId("copy-id").addEventListener("click", (event) => copyFrom(event.target, byId("sample-id").textContent));
    byId("copy-link").addEventListener("click", (event) => copyFrom(event.target, location.href));
  }

  /** Stop whatever is under way, so that the service does not decode for nobody, and show `state` instead. */
  close(state) {
    this.controller.abort();
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load(); // forgets the old pictures
    URL.revokeObjectURL(this.videoUrl);
    byId("frame").removeAttribute("src");
    this.channels.clear();
    byId("sample").hidden = true;
    showState(byId("detail-state"), state);
  }

  async open(dataset, id) {
    this.close(null);
    this.controller = new AbortController();
    const { signal } = this.controller;
    const path = samplePath(dataset, id);
    let sample = null;
    await loadInto(byId("detail-state"), signal, "Loading the sample…", async (onWait) => {
      [sample] = await Promise.all([requestJson(path, { signal, onWait }), pause(SETTLE_MS, signal)]);
      this.fill(path, sample);
      // not awaited: each part has a state of its own
      this.loadVideo(path, signal);
      this.loadLatent(path, sample, signal);
      if (sample.has_first_frame) this.loadFrame(path, signal);
    });
  }

  togglePlay() {
    if (!this.video.hasAttribute("src")) return;
    if (this.video.paused) this.video.play();
    else this.video.pause();
  }

  fill(path, sample) {
    const { caption, width, height } = sample.columns;
    byId("sample-caption").textContent = caption || "No caption";
    byId("sample-caption").classList.toggle("muted", !caption);
    byId("sample-id").textContent = sample.id;
    byId("video-facts").textContent = describeVideo(sample.columns);
    byId("latent-facts").textContent = "";
    byId("download-mp4").href = `${path}/video?container=mp4`;
    byId("download-mkv").href = `${path}/video?container=mkv`;
    byId("download-latent").href = `${path}/latent`;
    byId("frame-figure").hidden = !sample.has_first_frame;
    // the size is known before the pictures are, so nothing jumps when they come
    byId("pictures").style.setProperty("--ratio", width && height ? width / height : 1.5);
    fillMetadata(sample.columns);
    byId("latent").hidden = true;
    byId("sample").hidden = false;
    byId("detail").scrollTop = 0;
    byId("announcer").textContent = `Sample: ${caption || sample.id}`;
  }

  loadVideo(path, signal) {
    return loadInto(byId("video-state"), signal, "Decoding…", async (onWait) => {
      // Fetched, not given to <video> as an address: only so can a busy service or an error be told, and aborted.
      const response = await request(`${path}/video?container=mp4`, { signal, onWait });
      const video = await response.blob();
      signal.throwIfAborted();
      this.videoUrl = URL.createObjectURL(video);
      this.video.src = this.videoUrl;
      await settled(this.video, "loadedmetadata", signal, "This browser cannot play the video.");
      byId("pictures").style.setProperty("--ratio", this.video.videoWidth / this.video.videoHeight);
      if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.video.play().catch(() => {});
    });
  }

  loadFrame(path, signal) {
    return loadInto(byId("frame-state"), signal, "Loading…", async (onWait) => {
      const response = await request(`${path}/frame.png`, { signal, onWait });
      const url = URL.createObjectURL(await response.blob());
      signal.throwIfAborted();
      byId("frame").src = url;
      await settled(byId("frame"), "load", signal, "This browser cannot show the picture.");
      URL.revokeObjectURL(url);
    });
  }

  loadLatent(path, sample, signal) {
    return loadInto(byId("latent-state"), signal, "Loading the latent…", async (onWait) => {
      const response = await request(`${path}/latent`, { signal, onWait });
      const latent = parseLatent(await response.arrayBuffer());
      signal.throwIfAborted();
      byId("latent-facts").textContent = `${latent.shape.join(" × ")} · ${latent.dtype}`;
      byId("latent").hidden = false;
      this.channels.show(latent, sample.columns.num_frames ?? videoLength(latent.shape[1]), sample.columns.fps ?? 8);
    });
  }
}

/** Wait until a media element has what it was given. */
function settled(element, event, signal, complaint) {
  return new Promise((resolve, reject) => {
    element.addEventListener(event, resolve, { once: true, signal });
    element.addEventListener("error", () => reject(new Error(complaint)), { once: true, signal });
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

/** Datasets of other programs do not say everything. */
function describeVideo({ num_frames: frames, width, height, fps }) {
  const facts = [frames && `${frames} frames`, width && height && `${width} × ${height}`, fps && `${formatNumber(fps)} fps`];
  return facts.filter(Boolean).join(" · ");
}

/** What describes the stored tensors stands apart: it is long, and seldom what a person looks for. */
function fillMetadata(columns) {
  const entries = Object.entries(columns);
  const ofTensor = ([name]) => /_(shape|dtype|xxh3)$/.test(name);
  byId("metadata").replaceChildren(...entries.filter((entry) => !ofTensor(entry)).map(metadataRow));
  byId("tensor-metadata").replaceChildren(...entries.filter(ofTensor).map(metadataRow));
  byId("tensor-columns").hidden = !entries.some(ofTensor);
}

function metadataRow([name, value]) {
  const parts = name.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]); // long names break at their joints
  const cell = make("td", { className: value === null ? "none" : typeof value, dir: "auto" }, formatValue(value));
  return make("tr", {}, make("th", { scope: "row" }, ...parts), cell);
}

async function copyFrom(button, text) {
  const label = button.textContent;
  try {
    await copyText(text);
    button.textContent = "Copied";
  } catch (error) {
    button.textContent = `Not copied: ${error.message}`;
  }
  byId("announcer").textContent = button.textContent;
  button.disabled = true; // the label comes back before it can be pressed again
  setTimeout(() => {
    button.textContent = label;
    button.disabled = false;
  }, 1200);
}
