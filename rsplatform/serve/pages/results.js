// Result cards. Captions, names and kinds come from data and are only ever set as text.

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function card(result, index, { open, more, hover }) {
  const item = element("li", "card");
  item.dataset.chip = result.chip_id;
  const button = element("button", "open");
  button.type = "button";
  button.setAttribute("aria-label", `Result ${index + 1}: ${result.caption || result.chip_id}`);
  button.addEventListener("click", () => open(result.chip_id));
  const thumb = element("div", "thumb");
  const picture = element("img");
  Object.assign(picture, { src: result.thumbnail_url, alt: "", loading: "lazy" });
  thumb.append(picture);
  const words = element("div", "words");
  words.append(element("p", "caption", result.caption || "No caption"));
  const meta = element("div", "meta");
  meta.append(element("span", "score", result.score.toFixed(3)));
  if (result.ground_sample_distance_m) meta.append(element("span", "", `${result.ground_sample_distance_m.toPrecision(2)} m/px`));
  if (result.datetime) meta.append(element("time", "", result.datetime.slice(0, 10)));
  meta.append(element("span", "", result.scene));
  const similar = element("button", "more", "More like this");
  similar.type = "button";
  similar.addEventListener("click", () => more(result.chip_id));
  words.append(meta, similar);
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
    item.querySelector(".heat")?.remove();
    if (!isChosen) continue;
    item.scrollIntoView({ block: "nearest" });
    if (result.heatmap_url) {
      const heat = element("img", "heat");
      Object.assign(heat, { src: result.heatmap_url, alt: "" });
      item.querySelector(".thumb").append(heat);
    }
  }
}

export function hoverCard(list, chipId) {
  for (const item of list.children) item.classList.toggle("hover", item.dataset.chip === chipId);
}
