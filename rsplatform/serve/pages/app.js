// The page's state: what is asked lives in the URL, so that a link shares it; cards and map only show it.
import { MapView } from "./mapview.js";
import { showResults, selectCard, hoverCard } from "./results.js";

const $ = (id) => document.getElementById(id);
const state = { query: "", like: null, picture: null, bbox: null, results: [], selected: null, run: 0 };
let map;

async function call(path, body) {
  const options = body ? { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) } : {};
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(typeof answer.detail === "string" ? answer.detail : `The server answered ${response.status}.`);
  return answer;
}

function conditions() {
  const body = { k: Number($("k").value), localize: true };
  if (state.bbox) Object.assign(body, { bbox: state.bbox, bbox_relation: "within" });
  if ($("kind").value) body.kinds = [$("kind").value];
  const [from, to] = [$("from").value, $("to").value];
  if (from || to) body.datetime = `${from ? from + "T00:00:00Z" : ".."}/${to ? to + "T23:59:59Z" : ".."}`;
  return body;
}

function question() {
  if (state.picture) return { image: state.picture };
  if (state.like) return { chip_id: state.like };
  return state.query ? { text: state.query } : null;
}

async function search({ keepUrl = false, select = null } = {}) {
  const asked = question();
  if (!keepUrl) writeUrl();
  if (!asked) return showEmpty();
  if (!$("k").reportValidity()) return;
  const run = ++state.run;
  showError(null);
  $("empty").hidden = true;
  $("status").textContent = "Searching…";
  $("results").setAttribute("aria-busy", "true");
  try {
    const answer = await call("/v1/search", { ...asked, ...conditions() });
    if (run !== state.run) return; // a newer question was asked meanwhile
    state.results = answer.results;
    render(select);
  } catch (error) {
    if (run !== state.run) return;
    state.results = [];
    render(null);
    $("status").textContent = "";
    showError(error.message);
  } finally {
    if (run === state.run) $("results").removeAttribute("aria-busy");
  }
}

function render(select) {
  const found = state.results.length;
  const about = state.picture ? "like your picture" : state.like ? `like ${state.like}` : `for “${state.query}”`;
  $("status").textContent = found
    ? `${found} ${found === 1 ? "place" : "places"} ${about}${state.bbox ? " inside the area" : ""}`
    : `No chip ${about} meets these conditions. Try a larger area or fewer filters.`;
  showResults($("results"), state.results, { open: choose, more: findMore, hover: (id) => map.hover(id) });
  map.showResults(state.results, { fit: !state.bbox });
  const first = state.results.find((result) => result.chip_id === select) ?? state.results[0];
  choose(first?.chip_id ?? null, { move: Boolean(select) });
}

function choose(chipId, { move = true } = {}) {
  state.selected = chipId;
  const result = state.results.find((item) => item.chip_id === chipId) ?? null;
  selectCard($("results"), result);
  map.select(result, { move });
  $("overlay").hidden = !result?.heatmap_url;
  writeUrl();
}

function findMore(chipId) {
  Object.assign(state, { like: chipId, picture: null, query: "" });
  $("query").value = "";
  search();
}

async function findLikePlace([longitude, latitude]) {
  $("status").textContent = "Looking up this place…";
  showError(null);
  try {
    const here = { text: state.query || "an aerial image", k: 1, bbox: [longitude, latitude, longitude, latitude] };
    const { results } = await call("/v1/search", here);
    if (results.length) return findMore(results[0].chip_id);
    $("status").textContent = "No chip covers this place; click on the imagery.";
  } catch (error) {
    $("status").textContent = "";
    showError(error.message);
  }
}

function showEmpty() {
  state.run++;
  state.results = [];
  showError(null);
  $("status").textContent = "";
  $("empty").hidden = false;
  showResults($("results"), [], {});
  map.showResults([], {});
  map.select(null);
  $("overlay").hidden = true;
}

function showError(message) {
  $("error").hidden = !message;
  $("error").textContent = message ?? "";
}

function setArea(bbox, { run = true } = {}) {
  state.bbox = bbox;
  $("clear-area").hidden = !bbox;
  map.showArea(bbox);
  if (run) search();
}

function writeUrl() {
  const parameters = new URLSearchParams();
  const entries = { q: state.query, like: state.like, kind: $("kind").value, from: $("from").value, to: $("to").value, chip: state.selected };
  for (const [key, value] of Object.entries(entries)) if (value) parameters.set(key, value);
  if ($("k").value !== "12") parameters.set("k", $("k").value);
  if (state.bbox) parameters.set("bbox", state.bbox.map((degrees) => degrees.toFixed(6)).join(","));
  const query = parameters.toString();
  history.replaceState(null, "", query ? `?${query}` : location.pathname);
}

function readUrl() {
  const parameters = new URLSearchParams(location.search);
  state.query = (parameters.get("q") ?? "").slice(0, 512);
  state.like = parameters.get("like");
  $("query").value = state.query;
  $("k").value = parameters.get("k") ?? "12";
  for (const name of ["kind", "from", "to"]) $(name).value = parameters.get(name) ?? "";
  const bbox = (parameters.get("bbox") ?? "").split(",").map(Number);
  setArea(bbox.length === 4 && bbox.every(Number.isFinite) ? bbox : null, { run: false });
  search({ keepUrl: true, select: parameters.get("chip") });
}

function readPicture(file) {
  const reader = new FileReader();
  reader.onload = () => {
    Object.assign(state, { picture: reader.result, like: null, query: "" });
    $("query").value = "";
    search();
  };
  reader.onerror = () => showError("This file cannot be read.");
  reader.readAsDataURL(file);
}

function onKey(event) {
  const typing = event.target.closest("input, select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("query").focus();
  } else if (event.key === "Escape") {
    map.stopDrawing();
  } else if (["ArrowDown", "ArrowUp"].includes(event.key) && event.target.closest("#panel") && (!typing || typing.id === "query")) {
    const cards = [...$("results").querySelectorAll(".open")];
    if (!cards.length) return;
    event.preventDefault();
    const next = cards.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1);
    if (next < 0) $("query").focus();
    else cards[Math.min(next, cards.length - 1)].focus();
  }
}

function ask(text) {
  Object.assign(state, { query: text, like: null, picture: null });
  $("query").value = text;
  search();
}

function listen() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("query").value.trim();
    if (text || (!state.like && !state.picture)) ask(text);
    else search();
  });
  for (const id of ["k", "kind", "from", "to"]) $(id).addEventListener("change", () => search());
  $("draw").addEventListener("click", () => (map.isDrawing ? map.stopDrawing() : map.startDrawing()));
  $("view").addEventListener("click", () => setArea(map.viewBox()));
  $("clear-area").addEventListener("click", () => setArea(null));
  $("picture").addEventListener("change", (event) => event.target.files[0] && readPicture(event.target.files[0]));
  $("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  document.addEventListener("keydown", onKey);
}

function setOpacity(opacity) {
  document.documentElement.style.setProperty("--heat", String(opacity));
  map.setOpacity(opacity);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  map?.setTheme(theme);
}

function suggest(kinds) {
  for (const kind of Object.keys(kinds)) $("kind").append(new Option(`${kind} (${kinds[kind]})`, kind));
  const examples = Object.keys(kinds).slice(0, 6).map((kind) => `an aerial image of a ${kind}`);
  for (const text of examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => ask(text));
    $("suggestions").append(button);
  }
}

async function start() {
  const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme(localStorage.getItem("theme") ?? preferred);
  map = new MapView({
    onPlace: findLikePlace,
    onArea: setArea,
    onHover: (id) => hoverCard($("results"), id),
    onDrawing: (drawing) => {
      $("draw").setAttribute("aria-pressed", String(drawing));
      $("hint").hidden = !drawing;
    },
  });
  listen();
  try {
    const stats = await call("/v1/stats");
    $("served").textContent = `${stats.num_chips.toLocaleString()} chips · ${stats.model}`;
    suggest(stats.kinds);
    await map.showScenes(stats.scenes, document.documentElement.dataset.theme);
    readUrl();
  } catch (error) {
    showError(error.message);
  }
}

start();
