/**
 * Pillow's resize for 8-bit images, to the last bit.
 *
 * Pillow resizes one axis after the other with weights in fixed point, and rounds to 8 bits after each:
 * https://github.com/python-pillow/Pillow/blob/12.0.0/src/libImaging/Resample.c
 */

/** An image with 8 bits per channel, row by row: red, green and blue of every pixel. */
export interface RgbImage {
  width: number;
  height: number;
  data: Uint8Array | Uint8ClampedArray;
}

/** Padding around an image: the size of the padded axis, where the image begins on it, and the padding's colour. */
export interface Padding {
  size: number;
  offset: number;
  colour: readonly number[];
}

interface Filter {
  support: number;
  weigh: (x: number) => number;
}

const WEIGHT_ONE = 2 ** 22;

const sinc = (x: number): number => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

function cubic(distance: number): number {
  const x = Math.abs(distance);
  const a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** Filters under Pillow's numbers, as `resample` in processor_config.json. */
const FILTERS: Record<number, Filter> = {
  1: { support: 3, weigh: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
  2: { support: 1, weigh: (x) => Math.max(0, 1 - Math.abs(x)) },
  3: { support: 2, weigh: cubic },
};

interface Weights {
  starts: Int32Array;
  counts: Int32Array;
  values: Float64Array[];
}

function computeWeights(inputSize: number, outputSize: number, resample: number): Weights {
  const filter = FILTERS[resample];
  if (!filter) {
    throw new Error(`The image processor has \`resample\`=${resample}; this page knows ${Object.keys(FILTERS)}.`);
  }
  const scale = inputSize / outputSize;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  const weights: Weights = { starts: new Int32Array(outputSize), counts: new Int32Array(outputSize), values: [] };
  for (let i = 0; i < outputSize; i++) {
    const center = (i + 0.5) * scale;
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), inputSize);
    const values = new Float64Array(end - start);
    let sum = 0;
    for (let x = 0; x < values.length; x++) {
      values[x] = filter.weigh((x + start - center + 0.5) * (1 / stretch));
      sum += values[x];
    }
    for (let x = 0; x < values.length; x++) {
      const value = sum === 0 ? values[x] : values[x] / sum;
      values[x] = Math.trunc(value * WEIGHT_ONE + (value < 0 ? -0.5 : 0.5));
    }
    weights.starts[i] = start;
    weights.counts[i] = values.length;
    weights.values.push(values);
  }
  return weights;
}

/** Resize one axis, which may be padded. */
function resizeAxis(image: RgbImage, axis: "x" | "y", size: number, resample: number, padding?: Padding): RgbImage {
  const length = axis === "x" ? image.width : image.height;
  const inputSize = padding?.size ?? length;
  if (inputSize === size && !padding) return image;
  const offset = padding?.offset ?? 0;
  const colour = padding?.colour ?? [0, 0, 0];
  const { starts, counts, values } = computeWeights(inputSize, size, resample);
  const width = axis === "x" ? size : image.width;
  const height = axis === "y" ? size : image.height;
  const numLines = axis === "x" ? height : width;
  const inputStep = axis === "x" ? 3 : image.width * 3;
  const inputLine = axis === "x" ? image.width * 3 : 3;
  const outputStep = axis === "x" ? 3 : width * 3;
  const outputLine = axis === "x" ? width * 3 : 3;
  const output = new Uint8ClampedArray(width * height * 3);
  for (let i = 0; i < size; i++) {
    const first = starts[i];
    const weights = values[i];
    const begin = Math.max(first, offset);
    const end = Math.min(first + counts[i], offset + length);
    let rest = 0;
    for (let x = 0; x < weights.length; x++) {
      if (first + x < begin || first + x >= end) rest += weights[x];
    }
    for (let line = 0; line < numLines; line++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = WEIGHT_ONE / 2 + rest * colour[channel];
        let place = line * inputLine + (begin - offset) * inputStep + channel;
        for (let x = begin; x < end; x++, place += inputStep) sum += weights[x - first] * image.data[place];
        output[line * outputLine + i * outputStep + channel] = Math.floor(sum / WEIGHT_ONE);
      }
    }
  }
  return { width, height, data: output };
}

/** Resize an image as `_resize` of image_processing_flashsloth.py does: the axes in the order of Pillow 13. */
export function resize(image: RgbImage, width: number, height: number, resample: number): RgbImage {
  const excess = image.height - height;
  const isColumnsFirst = excess > 0 && excess > 2 * (image.width - width);
  const axes = isColumnsFirst ? (["y", "x"] as const) : (["x", "y"] as const);
  return axes.reduce((part, axis) => resizeAxis(part, axis, axis === "x" ? width : height, resample), image);
}

/** Pad an image to a centred square and resize it, without building the square. */
export function padAndResize(
  image: RgbImage,
  width: number,
  height: number,
  resample: number,
  colour: readonly number[],
): RgbImage {
  const size = Math.max(image.width, image.height);
  const left = Math.floor((size - image.width) / 2);
  const top = Math.floor((size - image.height) / 2);
  const rows = resizeAxis(image, "x", width, resample, { size, offset: left, colour });
  return resizeAxis(rows, "y", height, resample, { size, offset: top, colour });
}
