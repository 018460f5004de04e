// Two handles on one track: a range of dates, or of metres a pixel. What was asked for stays as it is, also where a
// link asks for more than the track shows; an end of the track is an open side.
const DAY_MS = 86_400_000;
const GSD_STEPS = 100;

const day = (text) => Math.floor(Date.parse(text) / DAY_MS);
const date = (number) => new Date(number * DAY_MS).toISOString().slice(0, 10);

class Range {
  static ends = ["first", "last"];

  constructor(root, onChange) {
    this.root = root;
    this.asked = [null, null];
    this.last = 0;
    this.clear = root.querySelector(".clear");
    this.clear.addEventListener("click", () => {
      this.ask([null, null]);
      onChange();
    });
    this.handles = [...root.querySelectorAll("input")];
    this.handles.forEach((handle, side) => {
      handle.addEventListener("input", () => this.moved(side));
      handle.addEventListener("change", onChange);
    });
  }

  // `last` is the last position, 0 where there is nothing to choose from; both sides of the track start open.
  span(last) {
    this.last = Math.max(0, last);
    for (const handle of this.handles) handle.max = this.last;
    this.root.querySelector(".track").hidden = this.last === 0;
    this.show();
  }

  moved(side) {
    const [low, high] = this.handles;
    if (Number(low.value) > Number(high.value)) this.handles[side].value = this.handles[1 - side].value;
    const position = Number(this.handles[side].value);
    this.asked[side] = position === (side ? this.last : 0) ? null : this.valueAt(position, side);
    this.describe();
  }

  ask(values) {
    this.asked = values;
    this.show();
  }

  show() {
    this.asked.forEach((value, side) => {
      const isOpen = value === null || this.last === 0;
      const position = isOpen ? (side ? this.last : 0) : this.positionOf(value);
      this.handles[side].value = Math.max(0, Math.min(this.last, position));
    });
    this.describe();
  }

  describe() {
    const [low, high] = this.handles.map((handle) => Number(handle.value));
    const words = this.asked.map((value, side) => (value === null ? null : this.words(value)));
    const any = words.every((each) => each === null);
    this.clear.hidden = any;
    this.root.hidden = any && this.last === 0; // what a link asks for can be cleared also where it fits nothing served
    this.root.querySelector("output").textContent = any ? "any" : words.map((each, side) => each ?? this.constructor.ends[side]).join(" – ");
    this.handles.forEach((handle, side) => handle.setAttribute("aria-valuetext", words[side] ?? "open"));
    this.root.style.setProperty("--low", `${(100 * low) / (this.last || 1)}%`);
    this.root.style.setProperty("--high", `${(100 * high) / (this.last || 1)}%`);
    // where both handles meet at the far end, the lower one must stay within reach
    this.root.classList.toggle("at-end", low >= (this.last || 1) / 2);
  }
}

export class DateRange extends Range {
  limit(range) {
    this.first = range ? day(range[0]) : 0;
    this.span(range ? day(range[1]) - this.first : 0);
  }

  valueAt(position) {
    return date(this.first + position);
  }

  positionOf(value) {
    return day(value) - this.first;
  }

  words(value) {
    return value;
  }

  // RFC 3339 interval of whole days; null where both sides are open.
  interval() {
    const [from, to] = this.asked;
    return from || to ? `${from ? `${from}T00:00:00Z` : ".."}/${to ? `${to}T23:59:59Z` : ".."}` : null;
  }
}

export class GsdRange extends Range {
  static ends = ["finest", "coarsest"];

  limit(range) {
    this.range = range;
    this.span(range && range[0] > 0 && range[1] > range[0] * 1.001 ? GSD_STEPS : 0);
  }

  // Logarithmic: from drones to satellites it is three orders of magnitude.
  valueAt(position) {
    const [low, high] = this.range;
    return Number((low * (high / low) ** (position / GSD_STEPS)).toPrecision(3));
  }

  positionOf(value) {
    const [low, high] = this.range;
    return Math.round((GSD_STEPS * Math.log(Math.max(value, 1e-6) / low)) / Math.log(high / low));
  }

  words(value) {
    return `${value} m`;
  }

  metres() {
    const [low, high] = this.asked;
    return low === null && high === null ? null : [low ?? 0, high ?? 1e6];
  }
}
