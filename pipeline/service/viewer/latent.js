// A latent as numbers: the safetensors body of /latent, its statistics, its pixels. No page in here.
//
// C channels, F latent frames, H/W latent cells

const MAX_RANK_VALUES = 1 << 16;
const LOW = 0.01;
const HIGH = 0.99;
const NOT_FINITE = [255, 0, 200];

/** `{ values: Float32Array, shape: [C, F, H, W], dtype }` of the tensor "latent". */
export function parseLatent(buffer) {
  const headerBytes = buffer.byteLength < 8 ? 0 : Number(new DataView(buffer).getBigUint64(0, true));
  if (headerBytes === 0 || headerBytes > buffer.byteLength - 8) {
    throw new Error(`not a safetensors file: ${buffer.byteLength} bytes with a header of ${headerBytes}`);
  }
  const entry = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, headerBytes))).latent;
  if (entry?.shape?.length !== 4) throw new Error(`expected a tensor "latent" [C, F, H, W], got ${JSON.stringify(entry)}`);
  const [begin, end] = entry.data_offsets;
  const bytes = buffer.slice(8 + headerBytes + begin, 8 + headerBytes + end); // a copy, so that views of it are aligned
  const convert = CONVERTERS[entry.dtype];
  if (!convert) throw new Error(`dtype ${entry.dtype}, expected one of ${Object.keys(CONVERTERS).join(", ")}`);
  const count = entry.shape.reduce((product, size) => product * size, 1);
  const width = entry.dtype === "F32" ? 4 : 2;
  if (bytes.byteLength !== count * width) {
    throw new Error(`${bytes.byteLength} bytes, expected ${count * width} for ${entry.dtype} ${entry.shape.join("×")}`);
  }
  return { values: convert(bytes), shape: entry.shape, dtype: NAMES[entry.dtype] };
}

const NAMES = { F32: "float32", F16: "float16", BF16: "bfloat16" };

const CONVERTERS = {
  F32: (bytes) => new Float32Array(bytes),
  BF16: (bytes) => {
    const bits = Uint32Array.from(new Uint16Array(bytes), (half) => half << 16);
    return new Float32Array(bits.buffer);
  },
  F16: (bytes) => Float32Array.from(new Uint16Array(bytes), halfToNumber),
};

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/**
 * Statistics of one channel over all frames, non-finite values left out and counted.
 * `low` and `high` are the 1st and 99th percentile, of at most 65,536 evenly spaced values.
 */
export function channelStatistics(latent, channel) {
  const values = channelValues(latent, channel);
  let count = 0, sum = 0, min = Infinity, max = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    count++;
    sum += value;
    if (value < min) min = value;
    if (value > max) max = value;
  }
  if (count === 0) return { mean: NaN, std: NaN, min: NaN, max: NaN, low: 0, high: 0, notFinite: values.length };
  const mean = sum / count;
  let squares = 0;
  for (const value of values) if (Number.isFinite(value)) squares += (value - mean) ** 2;
  const step = Math.ceil(values.length / MAX_RANK_VALUES);
  const ranked = values.filter((value, index) => index % step === 0 && Number.isFinite(value)).sort();
  const at = (rank) => ranked[Math.round(rank * (ranked.length - 1))] ?? mean;
  return { mean, std: Math.sqrt(squares / count), min, max, low: at(LOW), high: at(HIGH), notFinite: values.length - count };
}

function channelValues({ values, shape: [, F, H, W] }, channel) {
  return values.subarray(channel * F * H * W, (channel + 1) * F * H * W);
}

/** Write one channel of one frame into RGBA pixels: grey from `low` to `high`, a loud colour where not finite. */
export function paintChannel(latent, channel, frame, { low, high }, pixels) {
  const [, , H, W] = latent.shape;
  const values = channelValues(latent, channel).subarray(frame * H * W, (frame + 1) * H * W);
  const scale = high > low ? 255 / (high - low) : 0;
  for (let cell = 0; cell < values.length; cell++) {
    const value = values[cell];
    const grey = scale ? (value - low) * scale : 128; // the array clamps to 0…255 and rounds
    const [red, green, blue] = Number.isFinite(value) ? [grey, grey, grey] : NOT_FINITE;
    pixels.set([red, green, blue, 255], cell * 4);
  }
}

/** Frames of the video that so many latent frames decode to. */
export const videoLength = (latentFrames) => (latentFrames % 2 ? 4 * (latentFrames - 1) + 1 : 4 * latentFrames);

/**
 * The latent frame that a video frame was decoded from.
 * An odd number of latent frames gives its first one a single video frame; an even number shares evenly.
 */
export function latentFrameOf(videoFrame, latentFrames, videoFrames) {
  if (latentFrames === 1 || videoFrames <= 1) return 0;
  const frame = Math.min(Math.max(videoFrame, 0), videoFrames - 1);
  if (latentFrames % 2 === 0) return Math.floor((frame * latentFrames) / videoFrames);
  return Math.ceil((frame * (latentFrames - 1)) / (videoFrames - 1));
}

/** First and last video frame decoded from a latent frame. */
export function videoFramesOf(latentFrame, latentFrames, videoFrames) {
  let first = null, last = null;
  for (let frame = 0; frame < videoFrames; frame++) {
    if (latentFrameOf(frame, latentFrames, videoFrames) !== latentFrame) continue;
    first ??= frame;
    last = frame;
  }
  return [first, last];
}
