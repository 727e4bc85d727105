// The pane of samples: one page of the filtered dataset, and the fields that filter it.

import { requestJson, samplesPath } from "./api.js";
import { byId, formatCount, formatNumber, make } from "./dom.js";
import { loadInto, showState } from "./state.js";

export const PAGE_SIZE = 50;

export class List {
  /** `address(change)` gives the link of the present view with a change. */
  constructor(address) {
    this.address = address;
    this.controller = new AbortController();
    this.samples = [];
    this.total = 0;
  }

  get pages() {
    return Math.max(1, Math.ceil(this.total / PAGE_SIZE));
  }

  /** Load the page of a view. Whatever was loading before is given up. */
  async load(view) {
    this.controller.abort();
    this.controller = new AbortController();
    const { signal } = this.controller;
    this.view = view;
    byId("list").setAttribute("aria-busy", "true");
    this.complain(null);
    const fetchPage = async (onWait) => {
      try {
        const page = await requestJson(`${samplesPath(view.dataset)}?${query(view)}`, { signal, onWait });
        Object.assign(this, { samples: page.samples, total: page.total });
      } catch (error) {
        if (signal.aborted) throw error;
        Object.assign(this, { samples: [], total: 0 });
        this.render();
        if (![400, 422].includes(error.status)) throw error;
        this.complain(error.message);
      }
    };
    await loadInto(byId("list-state"), signal, "Loading samples…", fetchPage, () => {
      this.render();
      if (!this.samples.length) this.showEmpty();
    });
  }

  /** Say below the fields what the service has against them. */
  complain(sentence) {
    byId("filter-error").hidden = !sentence;
    byId("filter-error").textContent = sentence ?? "";
    byId("filter").setAttribute("aria-invalid", String(Boolean(sentence && this.view.filter)));
  }

  render() {
    const { view, total, samples } = this;
    const first = (view.page - 1) * PAGE_SIZE;
    const range = `${formatCount(first + 1)}–${formatCount(first + samples.length)} of ${formatCount(total)}`;
    byId("range").textContent = samples.length ? range : "";
    byId("previous-page").disabled = view.page <= 1;
    byId("next-page").disabled = view.page >= this.pages;
    byId("list").removeAttribute("aria-busy");
    byId("list").replaceChildren(...samples.map((sample) => this.row(sample)));
    this.mark(view.sample);
    byId("list").parentElement.scrollTop = 0;
  }

  showEmpty() {
    const { caption, bucket, filter } = this.view;
    const say = (state) => showState(byId("list-state"), { kind: "empty", ...state });
    const goTo = (label, change) => ({ label, run: () => (location.hash = this.address({ page: 1, ...change })) });
    const noFilter = { caption: "", bucket: "", filter: "" };
    if (!byId("filter-error").hidden) say({ text: "Nothing to list until the filter is mended." });
    else if (this.total) say({ title: `There are only ${this.pages} pages`, action: goTo("First page", {}) });
    else if (caption || bucket || filter) say({ title: "No sample matches", action: goTo("Clear the filters", noFilter) });
    else say({ title: "This dataset has no samples" });
  }

  row(sample) {
    const { id, caption, num_frames: frames, width, height, fps, source_uri: source } = sample;
    const title = make("span", { className: caption ? "title" : "title muted", dir: "auto" }, caption || "no caption");
    const facts = [frames && `${frames} f`, width && `${width} × ${height}`, fps && `${formatNumber(fps)} fps`];
    const name = make("span", { className: "source", title: source ?? "" }, fileName(source) || id.slice(0, 12));
    const second = make("span", { className: "facts" }, name, make("span", {}, facts.filter(Boolean).join(" · ")));
    const link = make("a", { href: this.address({ sample: id }) }, title, second);
    link.dataset.id = id;
    return make("li", {}, link);
  }

  /** Mark the sample that is open, bring it into sight, and let the focus follow if it is in the list. */
  mark(id) {
    this.view.sample = id;
    for (const link of byId("list").querySelectorAll("a")) {
      if (link.dataset.id !== id) {
        link.removeAttribute("aria-current");
        continue;
      }
      link.setAttribute("aria-current", "true");
      link.scrollIntoView({ block: "nearest" });
      if (byId("list").contains(document.activeElement)) link.focus({ preventScroll: true });
    }
  }

  /** Refresh the links, which hold the whole view. */
  relink() {
    for (const link of byId("list").querySelectorAll("a")) link.href = this.address({ sample: link.dataset.id });
  }

  /** The id `step` places from another, null beyond either end; the first of the page where the other is not on it. */
  neighbour(id, step) {
    const at = this.samples.findIndex((sample) => sample.id === id);
    if (at < 0) return this.samples[0]?.id ?? null;
    return this.samples[at + step]?.id ?? null;
  }
}

function query({ page, caption, bucket, filter }) {
  const parameters = new URLSearchParams({ offset: (page - 1) * PAGE_SIZE, limit: PAGE_SIZE });
  if (bucket) parameters.set("bucket", bucket);
  if (caption) parameters.set("caption", caption);
  for (const term of filter.split(";")) if (term.trim()) parameters.append("filter", term.trim());
  return parameters;
}

const fileName = (uri) => (uri ?? "").split(/[/\\]/).pop();
