/** From images to the tiles that the vision tower reads, as `FlashSlothImageProcessor` does. */

import { padAndResize, resize, type RgbImage } from "./resize";

/** The settings in processor_config.json that matter here. */
export interface ImageSettings {
  size: { height: number; width: number };
  resample: number;
  do_rescale: boolean;
  rescale_factor: number;
  do_normalize: boolean;
  image_mean: number | number[];
  image_std: number | number[];
  do_image_splitting: boolean;
}

/** Tiles of one image, `(numTiles, 3, height, width)`. */
export interface Tiles {
  data: Float32Array;
  dims: [number, 3, number, number];
}

const TILES_PER_SIDE = 2;

/** Number of tiles of an image: the whole image, and its quarters if it is split. */
export const countTiles = (settings: ImageSettings): number =>
  settings.do_image_splitting ? 1 + TILES_PER_SIDE ** 2 : 1;

const forChannels = (value: number | number[]): number[] => (Array.isArray(value) ? value : [value, value, value]);

/** Values of the 256 levels of every channel. */
function computeLevels(settings: ImageSettings): Float32Array[] {
  const mean = forChannels(settings.image_mean);
  const std = forChannels(settings.image_std);
  const scale = settings.do_rescale ? settings.rescale_factor : 1;
  return [0, 1, 2].map((channel) =>
    Float32Array.from({ length: 256 }, (_, level) =>
      settings.do_normalize ? (level * scale - mean[channel]) / std[channel] : level * scale,
    ),
  );
}

/** Turn an image into tiles. */
export function toTiles(image: RgbImage, settings: ImageSettings): Tiles {
  const { height, width } = settings.size;
  const numTiles = countTiles(settings);
  const data = new Float32Array(numTiles * 3 * height * width);
  const levels = computeLevels(settings);
  const write = (part: RgbImage, left: number, top: number, tile: number) => {
    for (let channel = 0; channel < 3; channel++) {
      let target = (tile * 3 + channel) * height * width;
      for (let y = top; y < top + height; y++) {
        for (let x = left; x < left + width; x++) {
          data[target++] = levels[channel][part.data[(y * part.width + x) * 3 + channel]];
        }
      }
    }
  };
  write(resize(image, width, height, settings.resample), 0, 0, 0);
  if (numTiles > 1) {
    const background = forChannels(settings.image_mean).map((value) => Math.trunc(value * 255));
    const [wide, high] = [TILES_PER_SIDE * width, TILES_PER_SIDE * height];
    const enlarged = padAndResize(image, wide, high, settings.resample, background);
    for (let tile = 1; tile < numTiles; tile++) {
      const [row, column] = [Math.floor((tile - 1) / TILES_PER_SIDE), (tile - 1) % TILES_PER_SIDE];
      write(enlarged, column * width, row * height, tile);
    }
  }
  return { data, dims: [numTiles, 3, height, width] };
}

/** Left, top, right and bottom of every tile, in pixels of the image; parts outside the image are padding. */
export function tileBoxes(width: number, height: number, numTiles: number): [number, number, number, number][] {
  const boxes: [number, number, number, number][] = [[0, 0, width, height]];
  const side = Math.max(width, height);
  const [left, top] = [Math.floor((side - width) / 2), Math.floor((side - height) / 2)];
  const step = side / TILES_PER_SIDE;
  for (let tile = 1; tile < numTiles; tile++) {
    const x = ((tile - 1) % TILES_PER_SIDE) * step - left;
    const y = Math.floor((tile - 1) / TILES_PER_SIDE) * step - top;
    boxes.push([x, y, x + step, y + step]);
  }
  return boxes;
}
