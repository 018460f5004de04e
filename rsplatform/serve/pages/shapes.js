// GeoJSON of boxes on Earth: [west, south, east, north] in degrees.
export const NOTHING = { type: "FeatureCollection", features: [] };

export function collection(features) {
  return { type: "FeatureCollection", features };
}

export function polygon(corners, properties) {
  return { type: "Feature", properties, geometry: { type: "Polygon", coordinates: [[...corners, corners[0]]] } };
}

export function boxCorners([west, south, east, north]) {
  return [[west, north], [east, north], [east, south], [west, south]];
}

export function dot([west, south, east, north]) {
  const coordinates = [(west + east) / 2, (south + north) / 2];
  return { type: "Feature", properties: { bounds: [west, south, east, north] }, geometry: { type: "Point", coordinates } };
}
