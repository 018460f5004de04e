// What helps asking: kinds and examples of what is served, and keys.
const $ = (id) => document.getElementById(id);

// The kinds that are served, as a filter and as examples to ask.
export function suggest(kinds, ask) {
  $("kind").replaceChildren(new Option("anything", ""));
  $("suggestions").replaceChildren();
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

// "/" goes to the search box, arrows go through the results, Escape stops drawing.
export function onKey(event, escape) {
  const typing = event.target.closest("input, select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("query").focus();
  } else if (event.key === "Escape") {
    escape();
  } else if (["ArrowDown", "ArrowUp"].includes(event.key) && event.target.closest("#panel") && (!typing || typing.id === "query")) {
    const cards = [...$("results").querySelectorAll(".open")];
    if (!cards.length) return;
    event.preventDefault();
    const next = cards.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1);
    if (next < 0) $("query").focus();
    else cards[Math.min(next, cards.length - 1)].focus();
  }
}
