/** Heat maps: where the model looked, as in saliency_flashsloth.py. */

import { tileBoxes } from "./preprocess";

/** Red, green, blue (0 to 255) and opacity (0 to 1), from no heat to the maximum. */
const COLOURS = [
  [0, 0, 0, 0.6],
  [130, 0, 40, 0.55],
  [235, 70, 30, 0.5],
  [255, 190, 40, 0.55],
  [255, 255, 200, 0.7],
];

/** Share of every patch on every pixel along one axis; a patch sums to at most 1. */
function shares(numPatches: number, start: number, patchSize: number, numPixels: number): Float64Array[] {
  return Array.from({ length: numPatches }, (_, patch) => {
    const [from, to] = [start + patchSize * patch, start + patchSize * (patch + 1)];
    const row = new Float64Array(numPixels);
    for (let pixel = Math.max(Math.floor(from), 0); pixel < Math.min(Math.ceil(to), numPixels); pixel++) {
      row[pixel] = Math.max(Math.min(to, pixel + 1) - Math.max(from, pixel), 0) / patchSize;
    }
    return row;
  });
}

/**
 * Spread the weights of an image's patches over the pixels that they cover.
 *
 * @param weights Weights of the patches of all tiles, row by row.
 * @param numTiles Tiles of the image: 1 or 5.
 * @param patchSize Side of a patch as a fraction of the tile's.
 * @returns `height * width` values; they sum to the sum of the weights, minus the share on padding.
 */
export function heatMap(
  weights: Float32Array,
  numTiles: number,
  patchSize: number,
  width: number,
  height: number,
): Float32Array {
  const numPatches = weights.length / numTiles;
  const side = Math.round(Math.sqrt(numPatches));
  const heat = new Float32Array(width * height);
  tileBoxes(width, height, numTiles).forEach(([left, top, right, bottom], tile) => {
    const rows = shares(side, top, patchSize * (bottom - top), height);
    const columns = shares(side, left, patchSize * (right - left), width);
    for (let i = 0; i < side; i++) {
      const line = new Float64Array(width);
      for (let j = 0; j < side; j++) {
        const weight = weights[tile * numPatches + i * side + j];
        for (let x = 0; x < width; x++) line[x] += weight * columns[j][x];
      }
      for (let y = 0; y < height; y++) {
        if (rows[i][y] === 0) continue;
        for (let x = 0; x < width; x++) heat[y * width + x] += rows[i][y] * line[x];
      }
    }
  });
  return heat;
}

/** Colours of a heat map, red, green, blue and opacity (0 to 255), to be drawn over its image. */
export function colourHeat(heat: Float32Array): Uint8ClampedArray<ArrayBuffer> {
  const maximum = heat.reduce((largest, value) => Math.max(largest, value), Number.MIN_VALUE);
  const pixels = new Uint8ClampedArray(heat.length * 4);
  heat.forEach((value, index) => {
    const place = (value / maximum) * (COLOURS.length - 1);
    const step = Math.min(Math.floor(place), COLOURS.length - 2);
    for (let channel = 0; channel < 4; channel++) {
      const [from, to] = [COLOURS[step][channel], COLOURS[step + 1][channel]];
      const level = from + (to - from) * (place - step);
      pixels[index * 4 + channel] = channel === 3 ? level * 255 : level;
    }
  });
  return pixels;
}
