// The next question: its text, and its images.

import { limits } from "./api.js";
import { byId, element, icon, say } from "./elements.js";
import { readImage } from "./images.js";

export const question = byId("question");
let images = [];

export async function addFiles(files) {
  say("");
  for (const file of files) {
    try {
      images.push(await readImage(file, limits.max_image_pixels));
    } catch {
      say(`${file.name || "What was pasted"} is not an image that this browser can read.`, true);
    }
  }
  showImages();
  question.focus();
}

// Return the images, which are no longer those of the next question.
export function takeImages() {
  const taken = images;
  images = [];
  showImages();
  return taken;
}

function showImages() {
  byId("images").replaceChildren(...images.map(thumbnail));
  fit();
}

function thumbnail(image, index) {
  const shown = element("img", { src: image.url, alt: image.name, title: image.name });
  const remove = element("button", { type: "button", title: "Remove" }, icon("remove"));
  remove.setAttribute("aria-label", `Remove ${image.name}`);
  remove.onclick = () => {
    images.splice(index, 1);
    showImages();
    (byId("images").querySelectorAll("button")[index] ?? question).focus();
  };
  return element("li", {}, shown, remove);
}

// Make the field as high as its text; there is nothing to send while it is empty.
export function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  byId("send").disabled = !question.value.trim();
}
