// The map: the user's scenes as base, footprints of results, the chosen chip's heatmap and peak, the drawn area.
/* global maplibregl */
import { keyHeaders } from "./api.js";
import { SceneTiles } from "./scenes.js";
import { boxCorners, collection, dot, NOTHING, polygon } from "./shapes.js";

const GROUND = { light: "#dfe5e3", dark: "#0b100f" };
const MAX_SPAN_IN_BOXES = 30;
const DOTS_BELOW_ZOOM = 10;
const MOVE = matchMedia("(prefers-reduced-motion: reduce)").matches ? { duration: 0 } : { duration: 500 };

function around(boxes) {
  const bounds = new maplibregl.LngLatBounds();
  for (const [west, south, east, north] of boxes) bounds.extend([west, south]).extend([east, north]);
  return bounds;
}

// What holds all boxes, or, where they lie so far apart that none could be seen, those near the first.
function worthSeeing(boxes) {
  const span = (some) => ((bounds) => Math.max(bounds.getEast() - bounds.getWest(), bounds.getNorth() - bounds.getSouth()))(around(some));
  const most = MAX_SPAN_IN_BOXES * span([boxes[0]]);
  return around(span(boxes) < most ? boxes : boxes.filter((box) => span([boxes[0], box]) < most));
}

// In place of the map where the browser cannot draw one: everything but the map works.
export class NoMap {
  isDrawing = false;
  isMissing = true;
  hover() {}
  select() {}
  setOpacity() {}
  setTheme() {}
  showArea() {}
  showResults() {}
  showScenes() {}
  startDrawing() {}
  stopDrawing() {}
  viewBox() { return null; }
}

export class MapView {
  isMissing = false;

  // Throws where the browser has no WebGL.
  constructor({ onPlace, onArea, onHover, onDrawing }) {
    this.actions = { onPlace, onArea, onHover, onDrawing };
    this.isDrawing = false;
    this.opacity = 0.75;
    this.map = new maplibregl.Map({
      container: "map",
      style: { version: 8, sources: {}, layers: [{ id: "ground", type: "background", paint: { "background-color": GROUND.light } }] },
      attributionControl: { compact: false },
      center: [0, 20],
      zoom: 1,
      maxZoom: 22,
      dragRotate: false,
      touchPitch: false,
      transformRequest: (url) => ({ url, headers: keyHeaders() }),
    });
    this.map.touchZoomRotate.disableRotation();
    this.map.addControl(new maplibregl.NavigationControl({ showCompass: false }), "top-right");
    this.map.addControl(new maplibregl.ScaleControl(), "bottom-left");
    this.loaded = new Promise((resolve) => this.map.once("load", resolve));
    const peak = document.createElement("div");
    peak.className = "peak";
    this.peak = new maplibregl.Marker({ element: peak });
    this.listen();
  }

  listen() {
    const { map } = this;
    map.on("click", ({ point, lngLat }) => this.isDrawing || this.justDrew || this.clicked(point, lngLat));
    map.on("mousemove", ({ point }) => {
      if (this.isDrawing || !map.getLayer("footprints")) return;
      const [over] = map.queryRenderedFeatures(point, { layers: ["footprints"] });
      this.hover(over?.properties.chip ?? null);
      this.actions.onHover(over?.properties.chip ?? null);
    });
    for (const [down, move, up] of [["mousedown", "mousemove", "mouseup"], ["touchstart", "touchmove", "touchend"]]) {
      map.on(down, (event) => this.isDrawing && this.drag(event, move, up));
    }
  }

  // On imagery: more like this place. On a dot, which stands for a scene that is not shown: go there.
  clicked(point, lngLat) {
    const [scene] = this.isReady ? this.map.queryRenderedFeatures(point, { layers: ["dots", "rest"] }) : [];
    if (scene) this.map.fitBounds(around([JSON.parse(scene.properties.bounds)]), { padding: 40, ...MOVE });
    else this.actions.onPlace([lngLat.lng, lngLat.lat]);
  }

  // Layers stand once the server told its scenes; a question may fail earlier, for want of a key.
  get isReady() {
    return Boolean(this.map.getSource("results"));
  }

  // Also again, with what is served by then; the view moves the first time only.
  async showScenes(scenes, theme) {
    await this.loaded;
    const isFirst = !this.map.getSource("scenes");
    if (isFirst) this.addLayers();
    this.tiles.show(scenes);
    const outlines = scenes.map((scene) => polygon(boxCorners(scene.bounds_lonlat), { scene: scene.id }));
    this.map.getSource("scenes").setData(collection(outlines));
    const dots = scenes.map(({ bounds_lonlat: bounds }) => dot(bounds));
    this.map.getSource("dots").setData(collection(dots));
    if (isFirst && scenes.length) this.map.fitBounds(worthSeeing(scenes.map((scene) => scene.bounds_lonlat)), { padding: 40, duration: 0 });
    this.setTheme(theme);
  }

  addLayers() {
    const { map } = this;
    for (const id of ["scenes", "results", "area", "dots", "rest"]) {
      map.addSource(id, { type: "geojson", data: NOTHING, ...(id === "results" && { promoteId: "chip" }) });
    }
    const strong = ["any", ["boolean", ["feature-state", "selected"], false], ["boolean", ["feature-state", "hover"], false]];
    // Far out, scenes are too small to see: their outlines show where they are.
    map.addLayer({ id: "scenes", type: "line", source: "scenes", minzoom: DOTS_BELOW_ZOOM, maxzoom: 11, paint: { "line-color": "#0f766e", "line-width": 2 } });
    map.addLayer({ id: "footprints", type: "fill", source: "results", paint: { "fill-color": "#fbbf24", "fill-opacity": ["case", strong, 0.02, 0.1] } });
    map.addLayer({ id: "footprint lines", type: "line", source: "results", paint: { "line-color": ["case", strong, "#fff7d6", "#fbbf24"], "line-width": ["case", strong, 3.5, 2] } });
    map.addLayer({ id: "area", type: "line", source: "area", paint: { "line-color": "#38bdf8", "line-width": 2.5, "line-dasharray": [2, 1.5] } });
    const paint = { "circle-radius": 7, "circle-color": "#0f766e", "circle-stroke-color": "#fff", "circle-stroke-width": 2 };
    map.addLayer({ id: "dots", type: "circle", source: "dots", maxzoom: DOTS_BELOW_ZOOM, paint });
    map.addLayer({ id: "rest", type: "circle", source: "rest", minzoom: DOTS_BELOW_ZOOM, paint });
    this.tiles = new SceneTiles(map, { above: "scenes", rest: "rest" });
  }

  setTheme(theme) {
    if (this.map.getLayer("ground")) this.map.setPaintProperty("ground", "background-color", GROUND[theme]);
  }

  showResults(results, { fit = false }) {
    if (!this.isReady) return;
    const placed = results.filter((result) => result.bounds_lonlat);
    const features = placed.map((result) => polygon(result.corners_lonlat, { chip: result.chip_id }));
    this.map.removeFeatureState({ source: "results" });
    this.map.getSource("results").setData(collection(features));
    if (fit && placed.length) {
      this.map.fitBounds(worthSeeing(placed.map((result) => result.bounds_lonlat)), { padding: this.margin(0.09), maxZoom: 18, ...MOVE });
    }
  }

  select(result, { move = true } = {}) {
    const { map } = this;
    if (!this.isReady) return;
    if (this.selected) map.setFeatureState({ source: "results", id: this.selected }, { selected: false });
    this.selected = result?.chip_id ?? null;
    if (map.getLayer("heatmap")) map.removeLayer("heatmap");
    if (map.getSource("heatmap")) map.removeSource("heatmap");
    this.peak.remove();
    if (!result?.bounds_lonlat) return;
    map.setFeatureState({ source: "results", id: this.selected }, { selected: true });
    if (result.heatmap_url) {
      map.addSource("heatmap", { type: "image", url: new URL(result.heatmap_url, location.origin).href, coordinates: result.corners_lonlat });
      const paint = { "raster-opacity": this.opacity, "raster-fade-duration": 0 };
      map.addLayer({ id: "heatmap", type: "raster", source: "heatmap", paint }, "footprints");
    }
    if (result.spot?.peak_lonlat) this.peak.setLngLat(result.spot.peak_lonlat).addTo(map);
    if (move) map.fitBounds(around([result.bounds_lonlat]), { padding: this.margin(0.16), maxZoom: 19, ...MOVE });
  }

  // Free space around what is shown, as a share of the map's shorter side.
  margin(share) {
    const { clientWidth, clientHeight } = this.map.getContainer();
    return Math.round(share * Math.min(clientWidth, clientHeight));
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    if (this.map.getLayer("heatmap")) this.map.setPaintProperty("heatmap", "raster-opacity", opacity);
  }

  hover(chip) {
    if (chip === this.hovered || !this.isReady) return;
    if (this.hovered) this.map.setFeatureState({ source: "results", id: this.hovered }, { hover: false });
    if (chip) this.map.setFeatureState({ source: "results", id: chip }, { hover: true });
    this.hovered = chip;
  }

  viewBox() {
    const bounds = this.map.getBounds();
    const clamp = (value, limit) => Math.max(-limit, Math.min(limit, value));
    return [clamp(bounds.getWest(), 180), clamp(bounds.getSouth(), 90), clamp(bounds.getEast(), 180), clamp(bounds.getNorth(), 90)];
  }

  startDrawing() {
    this.isDrawing = true;
    this.map.dragPan.disable();
    this.map.boxZoom.disable();
    this.map.getContainer().classList.add("drawing");
    this.actions.onDrawing(true);
  }

  stopDrawing() {
    this.isDrawing = false;
    this.map.dragPan.enable();
    this.map.boxZoom.enable();
    this.map.getContainer().classList.remove("drawing");
    this.actions.onDrawing(false);
  }

  drag(event, move, up) {
    event.preventDefault();
    const start = event.lngLat;
    let box = null;
    const onMove = ({ lngLat }) => {
      box = [Math.min(start.lng, lngLat.lng), Math.min(start.lat, lngLat.lat), Math.max(start.lng, lngLat.lng), Math.max(start.lat, lngLat.lat)];
      this.showArea(box);
    };
    this.map.on(move, onMove);
    this.map.once(up, () => {
      this.map.off(move, onMove);
      if (!this.isDrawing) return; // Escape came first
      this.stopDrawing();
      // the click that ends the drag is not a question about that place
      this.justDrew = true;
      setTimeout(() => { this.justDrew = false; }, 0);
      if (box) this.actions.onArea(box);
    });
  }

  showArea(bbox) {
    const features = bbox ? [polygon(boxCorners(bbox), {})] : [];
    this.map.getSource("area")?.setData(collection(features));
  }
}
