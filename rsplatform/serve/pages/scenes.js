// The scenes' imagery. A source for each of thousands is too much for a map and for the server: those nearest to the
// middle of the view have their tiles, and a dot stands for each of the rest.
import { collection, dot } from "./shapes.js";

const MAX_TILED = 64; // our default
const MARGIN = 0.5; // of the view's sides: what comes in while the map is dragged is there already

// MapLibre writes attributions as HTML; names of sources are data. OpenStreetMap asks for a link to its terms.
function attributionHtml(text) {
  const node = document.createElement("span");
  node.textContent = text;
  const terms = '<a href="https://www.openstreetmap.org/copyright" target="_blank" rel="noopener noreferrer">$&</a>';
  return node.innerHTML.replace(/OpenStreetMap( contributors)?/, terms);
}

// How far a box is from the view's middle, and whether they meet; a map may show the same place a turn further on.
function standing([west, south, east, north], [left, bottom, right, top]) {
  const [longitude, latitude] = [(left + right) / 2, (bottom + top) / 2];
  const turn = 360 * Math.round((longitude - (west + east) / 2) / 360);
  const narrow = Math.cos((latitude * Math.PI) / 180);
  const outside = (low, high, at) => Math.max(low - at, at - high, 0);
  return {
    meets: west + turn <= right && east + turn >= left && south <= top && north >= bottom,
    edge: Math.hypot(narrow * outside(west + turn, east + turn, longitude), outside(south, north, latitude)),
    middle: Math.hypot(narrow * ((west + east) / 2 + turn - longitude), (south + north) / 2 - latitude),
  };
}

// Of the scenes that meet the view: whose tiles to show, nearest first, and the rest, too many or too small to see.
export function inView(scenes, view, zoom, most = MAX_TILED) {
  const met = scenes.map((scene) => ({ scene, ...standing(scene.bounds_lonlat, view) })).filter(({ meets }) => meets);
  met.sort((one, other) => one.edge - other.edge || one.middle - other.middle);
  // a tile of 256 pixels is one zoom further in than MapLibre's own
  const hasTiles = ({ scene }) => Math.round(zoom + 1) >= scene.min_zoom;
  const tiled = met.filter(hasTiles).slice(0, most).map(({ scene }) => scene);
  const shown = new Set(tiled);
  return { tiled, rest: met.map(({ scene }) => scene).filter((scene) => !shown.has(scene)) };
}

const layerOf = (scene) => `scene ${scene.id}`;

export class SceneTiles {
  // Tiles go below the layer `above`; the source `rest` gets the dots.
  constructor(map, { above, rest }) {
    Object.assign(this, { map, above, rest, scenes: [], tiled: new Set() });
    map.on("moveend", () => this.update());
  }

  show(scenes) {
    for (const scene of this.tiled) this.remove(scene); // the same name may stand for another scene by now
    this.scenes = scenes;
    this.tiled = new Set();
    this.update();
  }

  update() {
    const { tiled, rest } = inView(this.scenes, this.view(), this.map.getZoom());
    const kept = new Set(tiled);
    for (const scene of this.tiled) if (!kept.has(scene)) this.remove(scene);
    this.tiled = kept;
    // later scenes lie above earlier ones, whichever came into view first
    let above = this.above;
    for (const scene of this.scenes.filter((each) => kept.has(each)).reverse()) {
      this.add(scene, above);
      above = layerOf(scene);
    }
    this.map.getSource(this.rest).setData(collection(rest.map((scene) => dot(scene.bounds_lonlat))));
  }

  view() {
    const bounds = this.map.getBounds();
    const [west, south, east, north] = [bounds.getWest(), bounds.getSouth(), bounds.getEast(), bounds.getNorth()];
    const [wide, high] = [MARGIN * (east - west), MARGIN * (north - south)];
    return [west - wide, south - high, east + wide, north + high];
  }

  add(scene, above) {
    const id = layerOf(scene);
    if (this.map.getSource(id)) return;
    this.map.addSource(id, {
      type: "raster",
      tiles: [`${location.origin}/tiles/${encodeURIComponent(scene.id)}/{z}/{x}/{y}.png`],
      tileSize: 256,
      bounds: scene.bounds_lonlat,
      minzoom: scene.min_zoom,
      maxzoom: scene.max_zoom,
      attribution: attributionHtml(scene.attribution),
    });
    this.map.addLayer({ id, type: "raster", source: id, paint: { "raster-fade-duration": 0 } }, above);
  }

  remove(scene) {
    this.map.removeLayer(layerOf(scene));
    this.map.removeSource(layerOf(scene));
  }
}
