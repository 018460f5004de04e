// The page's state: what is asked lives in the URL, so that a link shares it; cards and map only show it.
import { call, KeyNeeded, setKey, showPicture } from "./api.js";
import { onKey, suggest } from "./asking.js";
import { MapView, NoMap } from "./mapview.js";
import { readPicture } from "./picture.js";
import { DateRange, GsdRange } from "./ranges.js";
import { hoverCard, selectCard, showFigure, showResults } from "./results.js";

const $ = (id) => document.getElementById(id);
const state = { query: "", like: null, picture: null, bbox: null, results: [], selected: null, run: 0 };
let map, dates, gsd;

function conditions() {
  const body = { k: Number($("k").value), localize: true };
  if (state.bbox) Object.assign(body, { bbox: state.bbox, bbox_relation: "within" });
  if ($("kind").value) body.kinds = [$("kind").value];
  if (dates.interval()) body.datetime = dates.interval();
  if (gsd.metres()) body.gsd_m = gsd.metres();
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
  showAsked();
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
    render(select, answer.read_as);
  } catch (error) {
    if (run !== state.run) return;
    state.results = [];
    render(null);
    showProblem(error);
  } finally {
    if (run === state.run) $("results").removeAttribute("aria-busy");
  }
}

function render(select, readAs = { wanted: [], unwanted: [] }) {
  const found = state.results.length;
  const words = readAs.wanted.join("; ") || state.query;
  let about = state.picture ? "like your picture" : state.like ? `like ${state.like}` : `for “${words}”`;
  if (readAs.unwanted.length) about += ` without “${readAs.unwanted.join("; ")}”`;
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
  showFigure($("figure"), result, map.isMissing);
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
    showProblem(error);
  }
}

// What is asked by a picture or a chip, which the search box cannot show.
function showAsked() {
  const box = $("asked");
  box.hidden = !state.picture && !state.like;
  if (box.hidden) return;
  box.querySelector("span").textContent = state.picture ? "More like your picture" : `More like ${state.like}`;
  const image = box.querySelector("img");
  image.classList.remove("gone");
  if (state.picture) image.src = state.picture;
  else showPicture(image, `/chips/${encodeURIComponent(state.like)}.jpg`);
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
  showFigure($("figure"), null);
  $("overlay").hidden = true;
}

function showProblem(error) {
  $("status").textContent = "";
  const locked = error instanceof KeyNeeded;
  $("key").hidden = !locked;
  if (locked) $("key-value").focus();
  showError(locked && !state.triedKey ? null : error.message);
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
  const entries = { q: state.query, like: state.like, kind: $("kind").value, from: dates.asked[0], to: dates.asked[1], chip: state.selected };
  for (const [key, value] of Object.entries(entries)) if (value) parameters.set(key, value);
  if ($("k").value !== "12") parameters.set("k", $("k").value);
  if (gsd.metres()) parameters.set("gsd", gsd.asked.map((side) => side ?? "").join(","));
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
  $("kind").value = parameters.get("kind") ?? "";
  const isDate = (text) => (/^\d{4}-\d\d-\d\d$/.test(text ?? "") ? text : null);
  dates.ask([isDate(parameters.get("from")), isDate(parameters.get("to"))]);
  const metres = (parameters.get("gsd") ?? "").split(",").map((side) => Number.parseFloat(side));
  gsd.ask([0, 1].map((side) => (Number.isFinite(metres[side]) && metres[side] >= 0 ? metres[side] : null)));
  const bbox = (parameters.get("bbox") ?? "").split(",").map(Number);
  setArea(bbox.length === 4 && bbox.every(Number.isFinite) ? bbox : null, { run: false });
  search({ keepUrl: true, select: parameters.get("chip") });
}

async function askPicture(file) {
  const run = ++state.run; // what was asked before is not waited for
  $("picture").value = ""; // the same file may be chosen again
  $("status").textContent = "Reading the picture…";
  try {
    const picture = await readPicture(file);
    if (run !== state.run) return; // a newer question was asked meanwhile
    Object.assign(state, { picture, like: null, query: "" });
    $("query").value = "";
    search();
  } catch (error) {
    if (run !== state.run) return;
    $("results").removeAttribute("aria-busy");
    showProblem(error);
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
  for (const id of ["k", "kind"]) $(id).addEventListener("change", () => search());
  $("draw").addEventListener("click", () => (map.isDrawing ? map.stopDrawing() : map.startDrawing()));
  $("view").addEventListener("click", () => setArea(map.viewBox()));
  $("clear-area").addEventListener("click", () => setArea(null));
  $("clear-asked").addEventListener("click", () => ask(""));
  $("share").addEventListener("click", share);
  $("key").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key-value").value);
    $("key-value").value = "";
    state.triedKey = true;
    load();
  });
  $("picture").addEventListener("change", (event) => event.target.files[0] && askPicture(event.target.files[0]));
  $("opacity").addEventListener("input", (event) => setOpacity(event.target.value / 100));
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  document.addEventListener("keydown", (event) => onKey(event, () => map.stopDrawing()));
}

async function share() {
  if (state.picture) {
    $("status").textContent = "A link cannot hold your picture; use “More like this” on a result and share that.";
    return;
  }
  try {
    await navigator.clipboard.writeText(location.href);
    $("status").textContent = "Link copied: it opens this question with its filters and the chosen result.";
  } catch {
    $("status").textContent = "Copying was refused; the address bar holds the link.";
  }
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

async function start() {
  const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme(localStorage.getItem("theme") ?? preferred);
  map = openMap();
  dates = new DateRange($("dates"), () => search());
  gsd = new GsdRange($("gsd"), () => search());
  listen();
  await load();
}

function openMap() {
  try {
    return new MapView({
      onPlace: findLikePlace,
      onArea: setArea,
      onHover: (id) => hoverCard($("results"), id),
      onDrawing: (drawing) => {
        $("draw").setAttribute("aria-pressed", String(drawing));
        $("hint").hidden = !drawing;
      },
    });
  } catch (error) {
    console.warn("no map:", error);
    $("no-map").hidden = false;
    for (const id of ["map", "draw", "view"]) $(id).hidden = true;
    return new NoMap();
  }
}

// What is served, then what the link asks; again once a key was given.
async function load() {
  try {
    const stats = await call("/v1/stats");
    $("key").hidden = true;
    showError(null);
    $("served").textContent = `${stats.num_chips.toLocaleString()} chips · ${stats.model}`;
    suggest(stats.kinds, ask);
    dates.limit(stats.datetime);
    gsd.limit(stats.gsd_m);
    await map.showScenes(stats.scenes, document.documentElement.dataset.theme);
    readUrl();
  } catch (error) {
    showProblem(error);
  }
}

start();
