/** From files to pixels, as Pillow reads them: without colour management, and with the alpha channel dropped. */

import { decode, type DecodedPng } from "fast-png";
import { PageError } from "./errors";
import type { RgbImage } from "./resize";

const MAX_PIXELS = 178_956_970; // Pillow's limit for decompression bombs
const PNG_SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/**
 * Decode an image file.
 *
 * A canvas would lose the colours of transparent pixels, and browsers differ in how they round 16 bits. So PNGs are
 * decoded here; other formats by the browser.
 */
export async function decodeImage(file: Blob): Promise<RgbImage> {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes.length === 0) throw new PageError("This file is empty; choose another picture.");
  if (PNG_SIGNATURE.every((byte, index) => bytes[index] === byte)) {
    checkSize(readUint32(bytes, 16), readUint32(bytes, 20));
    try {
      return pngToRgb(decode(bytes, { checkCrc: false }));
    } catch {
      // such as an interlaced variant that the decoder does not know: the browser may
    }
  }
  return decodeInBrowser(file);
}

const readUint32 = (bytes: Uint8Array, offset: number): number =>
  new DataView(bytes.buffer, bytes.byteOffset).getUint32(offset);

function checkSize(width: number, height: number): void {
  if (width * height > MAX_PIXELS) {
    throw new PageError(`This picture has ${width}×${height} pixels, which is too many; make it smaller.`);
  }
}

async function decodeInBrowser(file: Blob): Promise<RgbImage> {
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file, {
      imageOrientation: "from-image",
      premultiplyAlpha: "none",
      colorSpaceConversion: "none",
    });
  } catch {
    throw new PageError(
      "This file is not a picture that the browser can read, or it is damaged; choose a PNG, JPEG, WebP or GIF.",
    );
  }
  checkSize(bitmap.width, bitmap.height);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new PageError("The browser has no memory left for this picture; make it smaller.");
  context.drawImage(bitmap, 0, 0);
  const { width, height } = bitmap;
  bitmap.close();
  return rgbaToRgb(width, height, context.getImageData(0, 0, width, height).data);
}

/** Drop the alpha channel. */
export function rgbaToRgb(width: number, height: number, rgba: Uint8ClampedArray): RgbImage {
  const data = new Uint8ClampedArray(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    data[to] = rgba[from];
    data[to + 1] = rgba[from + 1];
    data[to + 2] = rgba[from + 2];
  }
  return { width, height, data };
}

/** Add an opaque alpha channel. */
export function rgbToRgba(image: RgbImage): Uint8ClampedArray<ArrayBuffer> {
  const rgba = new Uint8ClampedArray(image.width * image.height * 4).fill(255);
  for (let from = 0, to = 0; from < image.data.length; from += 3, to += 4) {
    rgba[to] = image.data[from];
    rgba[to + 1] = image.data[from + 1];
    rgba[to + 2] = image.data[from + 2];
  }
  return rgba;
}

/** Convert a decoded PNG of any kind to 8 bits of red, green and blue. */
export function pngToRgb(png: DecodedPng): RgbImage {
  const { width, height, depth, channels, palette } = png;
  const data = new Uint8ClampedArray(width * height * 3);
  const isGrey = channels < 3 && !palette;
  // Pillow keeps 16 bits of grey images without alpha and rounds them to 8; it drops the lower 8 bits of all others.
  const toByte =
    depth === 16
      ? channels === 1
        ? (value: number) => Math.floor((value + 128) / 257)
        : (value: number) => value >> 8
      : (value: number) => (isGrey && depth < 8 ? (value * 255) / (2 ** depth - 1) : value);
  const read = depth < 8 ? unpack(png) : png.data;
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const source = pixel * channels + (isGrey || palette ? 0 : channel);
      data[pixel * 3 + channel] = palette ? (palette[read[source]]?.[channel] ?? 0) : toByte(read[source]);
    }
  }
  return { width, height, data };
}

/** Values of 1, 2 or 4 bits, of which a byte holds several; every row begins with a new byte. */
function unpack({ width, height, depth, data }: DecodedPng): Uint8Array {
  const values = new Uint8Array(width * height);
  const rowBytes = Math.ceil((width * depth) / 8);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const bit = x * depth;
      const byte = data[y * rowBytes + (bit >> 3)];
      values[y * width + x] = (byte >> (8 - depth - (bit & 7))) & (2 ** depth - 1);
    }
  }
  return values;
}
