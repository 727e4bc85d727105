// The viewer: pages through a dataset, shows a sample's video beside what is known about it.
//
// The address is the state. Everything a person chooses goes into the URL's hash, and `show` makes the page follow
// the hash, so that Back, reload and a shared link need no code of their own.

import { requestJson, signIn } from "./api.js";
import { Detail } from "./detail.js";
import { byId, formatCount, make } from "./dom.js";
import { List } from "./list.js";
import { loadInto, showState } from "./state.js";

const TYPING_MS = 250;
const HURRY_MS = 400;
const HINT = { kind: "empty", title: "Choose a sample", text: "Click one on the left, or press j and k to walk through them." };

const list = new List((change) => `#${encodeView({ ...readView(), ...change })}`);
const detail = new Detail();
let datasets = [];
let shown = {}; // the view that the page shows now
let pick = null; // which end of the next page to open, where j or k walked off this one

// -- the view and its address --------------------------------------------------------------------------------------

const EMPTY = { dataset: "", page: 1, caption: "", bucket: "", filter: "", sample: "" };

function readView() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const view = { ...EMPTY };
  for (const name of Object.keys(EMPTY)) view[name] = parameters.get(name) ?? EMPTY[name];
  view.page = Math.max(1, Math.floor(Number(view.page)) || 1);
  return view;
}

function encodeView(view) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) if (value !== EMPTY[name]) parameters.set(name, value);
  return parameters.toString();
}

/** Change the view. `replace` keeps a step of the history for what a person would not want to go back to. */
function navigate(change, { replace = false } = {}) {
  const address = `#${encodeView({ ...readView(), ...change })}`;
  if (address === location.hash) return;
  if (replace) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  show();
}

/** Make the page follow the address. */
function show() {
  if (!datasets.length) return;
  const view = readView();
  if (!view.dataset) return navigate({ dataset: datasets[0].name }, { replace: true });
  const dataset = datasets.find(({ name }) => name === view.dataset);
  const before = shown;
  shown = view;
  if (view.dataset !== before.dataset) fillDataset(dataset, view);
  fillFields(view);
  if (["dataset", "page", "caption", "bucket", "filter"].some((name) => view[name] !== before[name])) loadList(view);
  else list.relink();
  if (view.dataset !== before.dataset || view.sample !== before.sample) openSample(view);
}

async function loadList(view) {
  await list.load({ ...view });
  if (shown !== view || !pick) return;
  const sample = list.samples.at(pick === "first" ? 0 : -1)?.id;
  pick = null;
  if (sample) navigate({ sample }, { replace: true });
}

function openSample({ dataset, sample }) {
  document.body.classList.toggle("has-sample", Boolean(sample));
  document.title = `${sample ? `${sample.slice(0, 12)} · ` : ""}${dataset} · Latents`;
  list.mark(sample);
  if (sample) detail.open(dataset, sample);
  else detail.close(HINT);
}

// -- the fields ----------------------------------------------------------------------------------------------------

function fillDataset(dataset, view) {
  byId("dataset").value = view.dataset;
  const { buckets = {}, columns = [], num_samples: samples, model, warning } = dataset ?? {};
  byId("dataset-warning").textContent = warning ?? "";
  byId("dataset-warning").hidden = !warning;
  byId("dataset-facts").textContent = dataset ? [`${formatCount(samples)} samples`, model].filter(Boolean).join(" · ") : "";
  const options = Object.entries(buckets).map(([key, count]) => new Option(`${key} (${formatCount(count)})`, key));
  byId("bucket").replaceChildren(new Option("all", ""), ...options);
  byId("columns").replaceChildren(...columns.map((name) => make("option", { value: name })));
  byId("help-columns").textContent = columns.length ? `Columns here: ${columns.join(", ")}.` : "";
}

function fillFields(view) {
  for (const name of ["caption", "bucket", "filter"]) {
    const field = byId(name);
    if (name === "bucket" && ![...field.options].some(({ value }) => value === view.bucket)) {
      field.append(new Option(view.bucket, view.bucket)); // a link may name one that is not here: the service says so
    }
    const beingTyped = typing !== null && field === document.activeElement;
    if (!beingTyped && field.value.trim() !== view[name]) field.value = view[name];
  }
}

let typing = null;
let typedBefore = false; // one step of the history for one visit to a field

function applyFields() {
  clearTimeout(typing);
  typing = null;
  const [caption, bucket, filter] = ["caption", "bucket", "filter"].map((name) => byId(name).value.trim());
  const view = readView();
  if (caption === view.caption && bucket === view.bucket && filter === view.filter) return;
  navigate({ caption, bucket, filter, page: 1 }, { replace: typedBefore });
  typedBefore = true;
}

for (const name of ["caption", "filter"]) {
  byId(name).addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(applyFields, TYPING_MS);
  });
  byId(name).addEventListener("focus", () => (typedBefore = false));
}
byId("bucket").addEventListener("change", () => {
  typedBefore = false;
  applyFields();
});
byId("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  applyFields();
});
byId("dataset").addEventListener("change", (event) => navigate({ ...EMPTY, dataset: event.target.value }));
byId("previous-page").addEventListener("click", () => turnPage(-1));
byId("next-page").addEventListener("click", () => turnPage(1));
byId("back").addEventListener("click", () => navigate({ sample: "" }));

function turnPage(step) {
  const page = readView().page + step;
  if (page >= 1 && page <= list.pages) navigate({ page });
}

let steppedAt = -Infinity;

function stepSample(step) {
  const { sample, page } = readView();
  const next = list.neighbour(sample, step);
  const hurried = performance.now() - steppedAt < HURRY_MS; // Back should not retrace each sample that flew past
  steppedAt = performance.now();
  if (next) return navigate({ sample: next }, { replace: hurried });
  if (page + step < 1 || page + step > list.pages) return;
  pick = step > 0 ? "first" : "last";
  turnPage(step);
}

// -- keys ----------------------------------------------------------------------------------------------------------

const KEYS = {
  j: () => stepSample(1),
  ArrowDown: () => stepSample(1),
  k: () => stepSample(-1),
  ArrowUp: () => stepSample(-1),
  n: () => turnPage(1),
  p: () => turnPage(-1),
  "/": () => {
    byId("caption").focus();
    byId("caption").select();
  },
  " ": () => detail.togglePlay(),
  "?": () => byId("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (target.matches("input, select, textarea")) {
    if (key === "Escape") target.blur();
    if (!target.matches("[type=range], [type=checkbox]") || key.startsWith("Arrow") || key === " ") return;
  }
  if (key === " " && target.matches("button, summary, video, a[download]")) return; // they have a use for it
  if (key.startsWith("Arrow") && target.matches("video")) return;
  if (!KEYS[key]) return;
  event.preventDefault();
  KEYS[key]();
});
byId("help-open").addEventListener("click", () => byId("help").showModal());

// -- sign-in -------------------------------------------------------------------------------------------------------

document.addEventListener("unauthorized", () => {
  if (!byId("sign-in").open) byId("sign-in").showModal();
});

byId("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const complaint = byId("sign-in-error");
  byId("sign-in-submit").disabled = true;
  try {
    await signIn(byId("token").value.trim());
    byId("token").value = "";
    complaint.hidden = true;
    byId("sign-in").close();
    start();
  } catch (error) {
    complaint.textContent = error.message;
    complaint.hidden = false;
  } finally {
    byId("sign-in-submit").disabled = false;
  }
});

// -- start ---------------------------------------------------------------------------------------------------------

const forever = new AbortController().signal;

async function start() {
  shown = {};
  const fetchDatasets = async (onWait) => {
    ({ datasets } = await requestJson("v1/datasets", { onWait }));
  };
  await loadInto(byId("list-state"), forever, "Loading datasets…", fetchDatasets, () => {
    byId("dataset").replaceChildren(...datasets.map(({ name }) => new Option(name, name)));
    byId("dataset").disabled = datasets.length === 0;
    if (datasets.length) return show();
    showState(byId("list-state"), { kind: "empty", title: "No datasets", text: "The service was started without one." });
  });
}

window.addEventListener("hashchange", show);
detail.close(HINT);
start();
