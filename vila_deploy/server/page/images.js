// An image, {name, url, width, height}: read from a file, and redrawn where the server wants it.

import { element, say } from "./elements.js";

// What the server decodes; browsers read more kinds, which are redrawn as PNG.
const SENT_AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);

export async function readImage(file, maxPixels) {
  const url = await dataUrl(file);
  const decoded = await decode(url);
  const [width, height] = [decoded.naturalWidth, decoded.naturalHeight];
  const image = { name: file.name || "image", url, width, height };
  if (!SENT_AS_THEY_ARE.has(file.type)) {
    image.url = redrawn(decoded, 1, "image/png");
    say(`${image.name} is sent as PNG.`);
  }
  const pixels = image.width * image.height;
  if (maxPixels && pixels > maxPixels) {
    await scaleDown(image, Math.sqrt(maxPixels / pixels));
    const size = `${image.width} × ${image.height}`;
    say(`${image.name} was scaled down to ${size}, the most that this server takes.`);
  }
  return image;
}

export async function scaleDown(image, scale) {
  const decoded = await decode(image.url);
  image.url = redrawn(decoded, scale, "image/jpeg");
  const scaled = await decode(image.url);
  [image.width, image.height] = [scaled.naturalWidth, scaled.naturalHeight];
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function decode(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

function redrawn(decoded, scale, type) {
  const canvas = element("canvas", {
    // An SVG without a size has none.
    width: Math.max(1, Math.floor((decoded.naturalWidth || 512) * scale)),
    height: Math.max(1, Math.floor((decoded.naturalHeight || 512) * scale)),
  });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(decoded, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(type, 0.92);
}
