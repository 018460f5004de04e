// Result cards, and a picture in place of the map for results without a place. Captions, names and kinds come from
// data and are only ever set as text.
import { showPicture } from "./api.js";

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function picture(className, url) {
  const image = element("img", className);
  Object.assign(image, { alt: "", loading: "lazy" });
  showPicture(image, url);
  return image;
}

function facts(result) {
  const meta = element("div", "meta");
  meta.append(element("span", "score", result.score.toFixed(3)));
  if (result.ground_sample_distance_m) meta.append(element("span", "", `${result.ground_sample_distance_m.toPrecision(2)} m/px`));
  if (result.datetime) meta.append(element("time", "", result.datetime.slice(0, 10)));
  meta.append(element("span", "", result.scene));
  if (!result.bounds_lonlat) meta.append(element("span", "placeless", "no place on the map"));
  return meta;
}

function card(result, index, { open, more, hover }) {
  const item = element("li", "card");
  item.dataset.chip = result.chip_id;
  const button = element("button", "open");
  button.type = "button";
  const place = result.bounds_lonlat ? "" : ", no place on the map";
  button.setAttribute("aria-label", `Result ${index + 1}: ${result.caption || result.chip_id}${place}`);
  button.addEventListener("click", () => open(result.chip_id));
  const thumb = element("div", "thumb");
  thumb.append(picture("", result.thumbnail_url));
  const words = element("div", "words");
  words.append(element("p", "caption", result.caption || result.chip_id));
  const similar = element("button", "more", "More like this");
  similar.type = "button";
  similar.addEventListener("click", () => more(result.chip_id));
  words.append(facts(result), similar);
  item.append(thumb, words, button);
  item.addEventListener("pointerenter", () => hover(result.chip_id));
  item.addEventListener("pointerleave", () => hover(null));
  return item;
}

export function showResults(list, results, actions) {
  list.replaceChildren(...results.map((result, index) => card(result, index, actions)));
}

// Marks the chosen card and lays its heatmap over the thumbnail.
export function selectCard(list, result) {
  for (const item of list.children) {
    const isChosen = item.dataset.chip === result?.chip_id;
    item.classList.toggle("selected", isChosen);
    item.querySelector(".open").setAttribute("aria-current", String(isChosen));
    for (const node of item.querySelectorAll(".heat")) node.remove();
    if (!isChosen) continue;
    item.scrollIntoView({ block: "nearest" });
    if (result.heatmap_url) item.querySelector(".thumb").append(picture("heat", result.heatmap_url));
  }
}

export function hoverCard(list, chipId) {
  for (const item of list.children) item.classList.toggle("hover", item.dataset.chip === chipId);
}

// The chosen result at full size with its heatmap and peak, if it cannot lie on the map, or no map is there.
export function showFigure(figure, result, noMap = false) {
  figure.hidden = !result || (Boolean(result.bounds_lonlat) && !noMap);
  figure.replaceChildren();
  if (figure.hidden) return;
  const view = element("div", "view");
  view.append(picture("", result.thumbnail_url));
  if (result.heatmap_url) view.append(picture("heat", result.heatmap_url));
  if (result.spot) {
    const peak = element("span", "peak");
    [peak.style.top, peak.style.left] = result.spot.peak_fraction.map((part) => `${100 * part}%`);
    view.append(peak);
  }
  const place = result.bounds_lonlat ? "" : " · no place on the map";
  figure.append(view, element("figcaption", "muted", `${result.chip_id}${place}`));
}
