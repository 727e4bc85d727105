// Requests to the service: the one place that knows its errors, its "come back later" and its sign-in.

const MAX_ATTEMPTS = 30;
const DEFAULT_RETRY_S = 2;

/** What the service, or its absence, has to say. `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, reason, detail) {
    super(detail);
    this.status = status;
    this.reason = reason;
  }
}

export const samplesPath = (dataset) => `v1/datasets/${encodeURIComponent(dataset)}/samples`;
export const samplePath = (dataset, id) => `${samplesPath(dataset)}/${encodeURIComponent(id)}`;

/**
 * Fetch a path of the service.
 *
 * A busy (429) or starting (503) service is asked again when it says so; `onWait(sentence)` hears of each second
 * of it, and `onWait(null)` when the next attempt begins. A 401 also fires "unauthorized" on the document.
 */
export async function request(path, { signal, onWait = () => {}, ...options } = {}) {
  for (let attempt = 1; ; attempt++) {
    const response = await send(path, { signal, ...options });
    if (response.ok) return response;
    const error = await readError(response);
    const later = response.status === 429 || response.status === 503;
    if (!later || attempt === MAX_ATTEMPTS) {
      if (response.status === 401) document.dispatchEvent(new Event("unauthorized"));
      throw error;
    }
    const why = response.status === 429 ? "The service is busy" : "The service is not ready";
    for (let left = retryAfter(response); left > 0; left--) {
      onWait(`${why}; asking again in ${left} s.`);
      await pause(1000, signal);
    }
    onWait(null);
  }
}

export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

/** Trade the bearer token for a cookie, since a <video> or an <img> sends no headers. */
export async function signIn(token) {
  const response = await send("v1/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  if (!response.ok) throw await readError(response);
}

/** Resolve after a while, or reject as fetch does when aborted. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
  });
}

async function send(path, options) {
  try {
    return await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The service did not answer. It may have stopped, or the connection is down.");
  }
}

async function readError(response) {
  const body = await response.json().catch(() => null);
  const detail = body?.error?.detail ?? `The service answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(response.status, body?.error?.reason ?? "unknown", detail);
}

function retryAfter(response) {
  const seconds = Number(response.headers.get("Retry-After"));
  return Number.isFinite(seconds) && seconds > 0 ? Math.min(Math.ceil(seconds), 60) : DEFAULT_RETRY_S;
}
