// What stands where content will be, or would have been: loading, empty, an error with a way on.

import { make } from "./dom.js";

/**
 * Fill a `.state` box, or hide it where `state` is null.
 * `state` is `{ kind: "loading" | "empty" | "error", title, text, action: { label, run } }`, all but the kind optional.
 */
export function showState(box, state) {
  box.replaceChildren();
  box.hidden = !state;
  if (!state) return;
  const { kind, title, text, action } = state;
  box.dataset.kind = kind;
  box.setAttribute("role", kind === "error" ? "alert" : "status");
  if (kind === "loading") box.append(make("span", { className: "spinner", ariaHidden: "true" }));
  if (title) box.append(make("strong", {}, title));
  if (text) box.append(make("p", {}, text));
  if (!action) return;
  const button = make("button", { type: "button" }, action.label);
  button.addEventListener("click", action.run);
  box.append(button);
}

/**
 * Run `load(onWait)` and tell in the box what goes on: `text` with the seconds since, the service's wishes to wait,
 * an error with "Try again". `done()` follows when the box is free again. Nothing is told once the signal is aborted.
 */
export async function loadInto(box, signal, text, load, done = () => {}) {
  const started = performance.now();
  const say = (sentence) => {
    if (!signal.aborted) showState(box, { kind: "loading", text: sentence ?? text });
  };
  const timer = setInterval(() => {
    // not for screen readers, to whom each second would be read out
    const clock = box.querySelector(".clock") ?? make("span", { className: "clock", ariaHidden: "true" });
    clock.textContent = `${Math.round((performance.now() - started) / 1000)} s`;
    if (!signal.aborted) box.append(clock);
  }, 1000);
  say(null);
  try {
    await load(say);
    if (signal.aborted) return;
    showState(box, null);
    done();
  } catch (error) {
    if (signal.aborted) return;
    const again = () => loadInto(box, signal, text, load, done);
    showState(box, { kind: "error", text: error.message, action: { label: "Try again", run: again } });
  } finally {
    clearInterval(timer);
  }
}
